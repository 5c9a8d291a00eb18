"""Kill a training run (SIGKILL) at random points, also while it saves; check what is left.

python tests/kill_runs.py config.json NUM_KILLS SEED

Each round forks a child that trains and dies at its k-th write to disk, k random; after each, every
finished checkpoint must load. A round goes on where the last one was left, every fourth from
nothing. The last one is not killed. Prints one JSON object.
"""

import functools
import json
import os
import random
import shutil
import signal
import sys

import torch

import tlv.model  # noqa: F401  (imported once here, so that a round costs a fork)
from tlv import checkpoint, files
from tlv.config import build, load_json, resolve, resume_root
from tlv.runlog import RunLog
from tlv.train import train
from tlv.train_config import TrainConfig

MAX_POINT = 62  # a run of four steps that saves at each makes about 60 watched calls
WATCHED = [(os, "replace"), (os, "fsync"), (torch, "save"), (checkpoint.shutil, "rmtree"),
           (files, "write_text"), (RunLog, "add")]


def die_at(count: int) -> None:
    """Make the `count`-th call of a watched function the process's last."""
    left = [count]

    def wrap(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:
                # half of a file is there, then the power goes
                if function.__name__ == "save" and isinstance(args[1], (str, os.PathLike)):
                    with open(args[1], "wb") as file:
                        file.write(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapped

    for owner, name in WATCHED:
        setattr(owner, name, wrap(getattr(owner, name)))


def load_all(root) -> int:
    """Load every file of every finished checkpoint; return how many checkpoints there are."""
    steps = [step for folder in root.glob("*") for step in checkpoint.list_steps(folder)]
    for step in steps:
        json.loads((step / "state.json").read_text())
        for path in step.rglob("*.pt"):
            with torch.serialization.safe_globals(checkpoint.safe_classes()):
                torch.load(path, map_location="cpu", weights_only=True)
    return len(steps)


def main(path, num_kills, seed):
    config, rng = build(TrainConfig, load_json(path)), random.Random(seed)
    root, out_dir = resume_root(config.out_dir), resolve(config.out_dir)
    rounds = []
    for number in range(num_kills + 1):
        if number % 4 == 0 and number < num_kills:
            shutil.rmtree(root, ignore_errors=True)
        point = rng.randint(1, MAX_POINT) if number < num_kills else 10**9
        child = os.fork()
        if child == 0:
            die_at(point)
            train(config)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        was_killed = os.WIFSIGNALED(status)
        if not was_killed and os.WEXITSTATUS(status) != 0:
            raise SystemExit(f"round {number} failed by itself")
        is_finished = (out_dir / "checkpoint" / "config.json").is_file()
        rounds.append({"point": point, "killed": was_killed, "loads": load_all(root),
                       "finished": is_finished})
    print(json.dumps(rounds))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
