"""Start ranks as a subprocess, so that the caller holds no device memory: one rank or many.

`launch(config)` runs a stage to its end and shows its progress; it raises LaunchError with the end
of the log when a rank fails, and stops the ranks when it is interrupted (those of this machine end
by themselves when this process dies). A finished run with an equal fingerprint is not run again.
The only place in the workbook that starts training. Taught in notebook 03.
"""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tlv import ROOT, checkpoint
from tlv.config import ConfigError, demand, load_json, resolve, resume_root
from tlv.files import write_json, write_text
from tlv.ranks import free_port
from tlv.runlog import SAID, find_tensorboard, say
from tlv.train_config import TrainConfig, as_dict

TAIL_LINES = 40
# What a launcher sets for its own ranks; the caller may itself run under one.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK",
                  "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE",
                  "LOCAL_SIZE", "TLV_END_WITH_PARENT")
HANDED_ON = ("OMP_", "MKL_", "TOKENIZERS_", "HF_HUB_", "TQDM_", "DS_ACCELERATOR", "NCCL_", "GLOO_",
             "TORCH_")
PREFIXES = ("TORCHELASTIC_", "PMI_", "OMPI_")


class LaunchError(RuntimeError):
    """A rank failed; the message is what it said, or else the last lines of the log."""


@dataclass(frozen=True)
class LaunchConfig:
    """How ranks are started; how many are on one machine, and which machines there are."""

    num_ranks: int = 1  # per machine
    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    num_nodes: int = 1  # machines
    node_rank: int = 0  # this machine's number (torchrun: run the command on every machine)
    master_addr: str = "127.0.0.1"
    master_port: int | None = None  # None: a free one
    hostfile: str | None = None  # deepspeed: "name slots=8" per line, reached over ssh
    tensorboard: bool = False  # also draw the log in out_dir/tensorboard; needs the package

    def __post_init__(self):
        for name in ("num_ranks", "num_nodes"):
            demand(getattr(self, name) > 0, f"{name} = {getattr(self, name)} must be > 0")
        demand(0 <= self.node_rank < self.num_nodes,
               f"node_rank = {self.node_rank} must lie in [0, num_nodes = {self.num_nodes})")
        demand(self.hostfile is None or self.launcher == "deepspeed",
               f"hostfile = {self.hostfile!r} is read by launcher: deepspeed only")
        demand(self.master_port is None or 0 < self.master_port < 65536,
               f"master_port = {self.master_port} must lie in 1 to 65535; null takes a free one")
        is_far = self.num_nodes > 1 or self.hostfile is not None
        demand(not is_far or self.master_addr != "127.0.0.1",
               "several machines need master_addr, the address of the first one")
        demand(not is_far or self.master_port is not None,
               "several machines need master_port, a port free on the first one")
        demand(self.num_nodes == 1 or self.launcher == "torchrun" or self.hostfile is not None,
               f"num_nodes = {self.num_nodes} with launcher: deepspeed needs a hostfile")

    @property
    def world_size(self) -> int:
        """Ranks on all machines together."""
        return self.num_ranks * self.num_nodes


def command(config_path, launch_config: LaunchConfig, port: int) -> list[str]:
    """The command line that starts the ranks of this machine (deepspeed + hostfile: of all).

    Always this Python (never one found on PATH). One rank needs no launcher.
    """
    c, python, target = launch_config, [sys.executable, "-m"], ["tlv.train", str(config_path)]
    target += ["--tensorboard"] * c.tensorboard
    if c.hostfile is not None:
        where = [f"--hostfile={c.hostfile}", f"--num_nodes={c.num_nodes}"]
    else:
        where = []
    if c.launcher == "deepspeed":
        return [*python, "deepspeed.launcher.runner", *where, f"--num_gpus={c.num_ranks}",
                f"--master_addr={c.master_addr}", f"--master_port={port}", "--no_local_rank",
                "--module", *target]
    if c.world_size == 1:
        return [*python, *target]
    return [*python, "torch.distributed.run", f"--nproc_per_node={c.num_ranks}",
            f"--nnodes={c.num_nodes}", f"--node_rank={c.node_rank}",
            f"--master_addr={c.master_addr}", f"--master_port={port}", "--module", *target]


def environment(config: TrainConfig, launch_config: LaunchConfig, base: dict) -> dict:
    """The ranks' environment: `base` without another launcher's variables, threads fixed."""
    env = {k: v for k, v in base.items()
           if k not in RANK_VARIABLES and not k.startswith(PREFIXES)}
    threads = str(config.num_threads)
    env |= {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    env |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), base.get("PYTHONPATH")]))
    if config.device != "auto":
        env["DS_ACCELERATOR"] = config.device
    if config.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    if launch_config.hostfile is None:  # over ssh there is no stdin to hold
        env["TLV_END_WITH_PARENT"] = "1"
    return env


def find_finished(config: TrainConfig, launch_config: LaunchConfig) -> bool:
    """Does out_dir hold the finished run of just these settings, annotations (not the clips),
    model folder, code and versions? One that was kept elsewhere is brought back."""
    out_dir, root = resolve(config.out_dir), resume_root(config.out_dir)
    report, model = out_dir / "report.json", out_dir / "checkpoint" / "config.json"
    is_there = report.is_file() and model.is_file()
    if not is_there and not any(root.glob(f"*/{checkpoint.FINISHED}")):
        return False
    mark = checkpoint.fingerprint(config, launch_config.world_size)
    if is_there and load_json(report).get("fingerprint") == mark:
        return True
    return checkpoint.bring_back(root / mark, out_dir)


def launch(config: TrainConfig, launch_config: LaunchConfig | None = None) -> Path:
    """Train as `config` says; return the folder of the finished model, out_dir/checkpoint.

    Progress streams to stderr (TQDM_DISABLE=1 hides the bar). Raises LaunchError.
    """
    from tlv.train import TrainingError, check_inputs, lock_run

    launch_config = launch_config or LaunchConfig()
    if launch_config.hostfile is not None:
        check_hostfile(launch_config)
    elif launch_config.launcher == "deepspeed" and config.device != "cpu":
        check_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if launch_config.tensorboard:
        find_tensorboard()
    check_inputs(config)
    final = resolve(config.out_dir) / "checkpoint"
    if find_finished(config, launch_config):
        say(f"a finished run with equal settings, inputs and code is there: {final}")
        return final
    root = resume_root(config.out_dir)
    rank = launch_config.node_rank
    if rank == 0:  # on a shared disk the others may come when the first rank holds the lock
        try:
            with lock_run(root):
                pass  # the first rank will take it; a live run's files are not to be replaced
        except TrainingError as error:
            raise LaunchError(str(error)) from error
    config_path = root / "config.json"
    write_json(config_path, as_dict(config))
    port = launch_config.master_port or free_port()
    env = environment(config, launch_config, dict(os.environ))
    if launch_config.hostfile is not None:
        env["DS_ENV_FILE"] = str(_write_exports(env, root / "exports"))
    _run(command(config_path, launch_config, port), env,
         root / ("train.log" if rank == 0 else f"train.{rank}.log"))
    return final


def check_hostfile(launch_config: LaunchConfig) -> None:
    """Raise ConfigError unless the hostfile names as many machines as there should be."""
    name = launch_config.hostfile
    if not resolve(name).is_file():
        raise ConfigError(f"hostfile = {name}: no such file; it names a machine a line, such as "
                          "`name slots=8`")
    lines = [line.strip() for line in resolve(name).read_text().splitlines()]
    count = sum(bool(line) and not line.startswith("#") for line in lines)
    if count != launch_config.num_nodes:  # DeepSpeed would train on fewer without a word
        raise ConfigError(f"hostfile = {name} names {count} machines, but num_nodes is "
                          f"{launch_config.num_nodes}; make both the same")


def check_visible(devices: str | None) -> None:
    """Raise ConfigError where DeepSpeed's launcher would use other GPUs than the chosen ones."""
    if devices:
        raise ConfigError(f"CUDA_VISIBLE_DEVICES = {devices!r}: launcher: deepspeed takes the "
                          "first GPUs whatever it says; take launcher: torchrun, or unset it")


def _write_exports(env: dict, path: Path) -> Path:
    """What DeepSpeed hands on to ranks that it starts over ssh, which see nothing else of `env`."""
    handed_on = {name: value for name, value in env.items() if name.startswith(HANDED_ON)}
    write_text(path, "".join(f"{name}={value}\n" for name, value in sorted(handed_on.items())))
    return path


def _run(arguments: list[str], env: dict, log_path: Path) -> None:
    """Run to the end, copying what the ranks say to stderr and to `log_path`."""
    # Its own session: the launcher and all ranks are one group that can be stopped as a whole.
    process = subprocess.Popen(arguments, env=env, cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        with open(log_path, "wb") as log:
            while chunk := process.stdout.read1(65536):
                log.write(chunk)
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()
        code = process.wait()
    finally:
        _stop(process)
    if code != 0:
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lines = log_path.read_text(errors="replace").splitlines()
        said = dict.fromkeys(line.split(SAID, 1)[1] for line in lines if SAID in line)
        if said:  # each rank may have said it
            raise LaunchError("\n".join([*said, f"(the whole log is {log_path})"]))
        tail = "\n".join([line for line in lines if line.strip()][-TAIL_LINES:])
        raise LaunchError(f"training ended with {name}; the whole log is {log_path}, and its end "
                          f"is:\n{tail}\ncommand: {' '.join(arguments)}")


def _stop(process) -> None:
    """End what still runs: ask the group, then kill it. Closing stdin ends ranks left behind."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, request)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
    process.stdin.close()
    process.stdout.close()
