"""How ranks are started; the command is a pure function, so no GPU or second machine is needed."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from tlv.config import ConfigError
from tlv.launch import (
    LaunchConfig,
    LaunchError,
    _run,
    _write_exports,
    check_hostfile,
    command,
    environment,
    launch,
)
from tlv.runlog import SAID
from tlv.train_config import TrainConfig

CONFIG = TrainConfig(model_dir="m", data="d", videos_dir="v", out_dir="o", num_steps=1,
                     lr_connector=1.0, device="cpu", num_threads=2)


def is_alive(pid: int) -> bool:
    try:
        state = open(f"/proc/{pid}/stat").read().rsplit(")")[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(claim, seconds=60):
    end = time.time() + seconds
    while not claim() and time.time() < end:
        time.sleep(0.05)
    assert claim()


def test_one_rank_needs_no_launcher():
    assert command("c.json", LaunchConfig(), 5) == [sys.executable, "-m", "tlv.train", "c.json"]


def test_many_ranks_go_through_torchrun():
    assert command("c.json", LaunchConfig(num_ranks=4), 29501) == [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--nnodes=1",
        "--node_rank=0", "--master_addr=127.0.0.1", "--master_port=29501", "--module",
        "tlv.train", "c.json"]


def test_several_machines_with_torchrun_name_the_first_one():
    config = LaunchConfig(num_ranks=8, num_nodes=2, node_rank=1, master_addr="a", master_port=7)
    line = command("c.json", config, 7)
    assert {"--nnodes=2", "--node_rank=1", "--master_addr=a", "--master_port=7"} <= set(line)


def test_several_machines_with_deepspeed_read_the_hostfile():
    config = LaunchConfig(num_ranks=8, num_nodes=2, launcher="deepspeed", hostfile="hosts",
                          master_addr="a", master_port=7)
    assert command("c.json", config, 7) == [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile=hosts", "--num_nodes=2",
        "--num_gpus=8", "--master_addr=a", "--master_port=7", "--no_local_rank", "--module",
        "tlv.train", "c.json"]
    assert "TLV_END_WITH_PARENT" not in environment(CONFIG, config, {})


def test_tensorboard_is_a_matter_of_the_launch_and_not_of_the_run():
    for settings in (LaunchConfig(), LaunchConfig(num_ranks=2),
                     LaunchConfig(num_ranks=2, launcher="deepspeed")):
        with_it = command("c.json", dataclasses.replace(settings, tensorboard=True), 7)
        assert with_it == [*command("c.json", settings, 7), "--tensorboard"]


def test_the_ranks_environment_is_clean_and_its_threads_are_set():
    env = environment(CONFIG, LaunchConfig(), {
        "RANK": "3", "WORLD_SIZE": "8", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x",
        "HOME": "/h", "OMP_NUM_THREADS": "64"})
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(env)
    assert env["OMP_NUM_THREADS"] == "2" and env["HOME"] == "/h"
    assert env["DS_ACCELERATOR"] == "cpu" and env["CUDA_VISIBLE_DEVICES"] == ""


def test_a_failure_shows_the_end_of_the_log(tmp_path, capsys):
    code = "[print('line', i) for i in range(99)]; raise SystemExit('no such clip')"
    with pytest.raises(LaunchError) as error:
        _run([sys.executable, "-c", code], dict(os.environ), tmp_path / "log")
    assert "exit code 1" in str(error.value) and "no such clip" in str(error.value)
    assert "line 5\n" not in str(error.value) and "line 5\n" in (tmp_path / "log").read_text()
    assert "line 5\n" in capsys.readouterr().err  # all of it was shown as it came


def test_a_line_that_comes_in_pieces_is_shown_whole(tmp_path):
    code = ("import sys, time; print('no such ', end='', flush=True); time.sleep(0.2); "
            "print('clip', flush=True); sys.exit(1)")
    with pytest.raises(LaunchError, match="its end is:\nno such clip\ncommand"):
        _run([sys.executable, "-c", code], dict(os.environ), tmp_path / "log")


def test_what_a_rank_says_is_the_message_without_what_its_launcher_adds(tmp_path):
    code = ("import sys; print('Traceback ...'); print(sys.argv[1] + 'data = x: no'); "
            "print(sys.argv[1] + 'such file'); [print('noise') for _ in range(99)]; sys.exit(1)")
    with pytest.raises(LaunchError) as error:
        _run([sys.executable, "-c", code, SAID], dict(os.environ), tmp_path / "log")
    assert str(error.value) == f"data = x: no\nsuch file\n(the whole log is {tmp_path / 'log'})"


def test_what_a_rank_on_another_machine_said_is_found_behind_its_name(tmp_path):
    code = "import sys; print('host2: ' + sys.argv[1] + 'data = x: no'); sys.exit(1)"
    with pytest.raises(LaunchError, match="^data = x: no\n"):
        _run([sys.executable, "-c", code, SAID], dict(os.environ), tmp_path / "log")


def test_a_hostfile_of_other_machines_than_there_should_be_is_refused(tmp_path):
    config = LaunchConfig(num_ranks=8, num_nodes=2, launcher="deepspeed", master_addr="a",
                          master_port=29500, hostfile=str(tmp_path / "hosts"))  # fmt: skip
    (tmp_path / "hosts").write_text("# two\na slots=8\n\n")
    with pytest.raises(ConfigError, match="hosts names 1 machines, but num_nodes is 2; make both"):
        check_hostfile(config)
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    check_hostfile(config)


def test_gpus_that_deepspeed_would_not_keep_to_are_no_silent_choice(monkeypatch):
    config = dataclasses.replace(CONFIG, device="auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES = '2,3': launcher: deepspeed"):
        launch(config, LaunchConfig(num_ranks=2, launcher="deepspeed"))


def test_ranks_over_ssh_get_the_settings_and_nothing_else(tmp_path):
    env = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "HOME": "/root", "API_TOKEN": "secret"}
    path = _write_exports(env, tmp_path / "exports")
    assert path.read_text() == "HF_HUB_OFFLINE=1\nOMP_NUM_THREADS=2\n"


def test_an_interrupt_stops_the_ranks(tmp_path):
    code = (f"import sys; sys.path.insert(0, {os.getcwd()!r})\n"
            "from pathlib import Path; import os; from tlv.launch import _run\n"
            "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
            f"_run([sys.executable, '-c', child], dict(os.environ), Path({str(tmp_path)!r}) / 'l')")
    # A job that a shell started in the background ignores interrupts, and so would its children.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
                              preexec_fn=heed)
    child = int(parent.stderr.readline())
    assert is_alive(child)
    parent.send_signal(signal.SIGINT)
    wait_until(lambda: not is_alive(child))
    assert parent.wait(10) != 0
    parent.stderr.close()


def test_ranks_end_when_the_launcher_is_killed():
    code = ("from tlv.ranks import end_with_launcher; import time; end_with_launcher();"
            "print('up', flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"up\n"
    child.stdin.close()  # what the system does with the pipe of a killed launcher
    assert child.wait(10) == 1
    child.stdout.close()
