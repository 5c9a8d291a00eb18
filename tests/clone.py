"""A copy of this working tree as a git repository of its own, for tests that run the pipeline."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tlv import ROOT


def environment(folder) -> dict[str, str]:
    """What commands in `folder` run with: its own tlv, one thread, nothing of an outer pipeline."""
    outer = ("GIT_", "DVC_", "MAKE", "MFLAGS")
    env = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    return env | {
        "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
        "PYTHONPATH": str(folder),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(Path(folder).parent / "site-cache"),
        "OMP_NUM_THREADS": "1",
    }


def run(command, folder, **options) -> str:
    """Run a command in `folder` with its own tlv; returns what it printed, fails with it."""
    done = subprocess.run(command, cwd=folder, env=environment(folder), text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, **options)  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}"
    return done.stdout


def commit(folder, message="Change") -> None:
    run(["git", "add", "-A"], folder)
    own = {"user.name": "t", "user.email": "t@t", "commit.gpgsign": "false",
           "core.hooksPath": "/dev/null"}  # whatever the user's git has  # fmt: skip
    settings = [word for key, value in own.items() for word in ("-c", f"{key}={value}")]
    run(["git", *settings, "commit", "-qm", message], folder)


def make_clone(folder: Path) -> Path:
    """Copy what git would hold (committed or not) to `folder` and commit it there."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT,
                            text=True, capture_output=True, check=True).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run(["git", "init", "-q", "-b", "main"], folder)
    commit(folder, "Copy")
    return folder


def stages(folder=ROOT) -> dict:
    """The notebook stages of dvc.yaml: name -> definition."""
    found = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    return {name: stage for name, stage in found.items() if name != "code"}


NAMES = [name for name in stages() if not name.startswith("image_")]
IMAGE = [name for name in stages() if name.startswith("image_")]  # other params, same notebooks


def own_folder(stage: str) -> str:
    """Where a stage's params and outputs are, below the preset's."""
    return stage.replace("image_", "image/")


def repro(folder, *arguments) -> list[str]:
    """`dvc repro`; returns the stages that it ran."""
    return re.findall(r"Running stage '(.+?)'", run(["dvc", "repro", *arguments], folder))


def use_preset(folder, preset: str, params: dict[str, dict]) -> None:
    """Write params/<preset>/ and make it the preset that runs."""
    (folder / "params" / preset).mkdir(exist_ok=True)
    for name, values in params.items():
        path = folder / "params" / preset / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False))
    launch = folder / "params" / preset / "launch.yaml"
    if not launch.exists():
        launch.write_text("num_ranks: 1\n")
    (folder / "params" / "preset.yaml").write_text(f"preset: {preset}\n")
