"""Processes beside a notebook: what they give back, what fails in them, and that none is left."""

import os
import subprocess
import sys

import psutil
import pytest

from tlv import ROOT
from tlv.background import Background

PRIORITY = os.getpriority, {"which": os.PRIO_PROCESS, "who": 0}
PAUSED = """
import signal, sys
from tlv.background import Background
if __name__ == "__main__":
    background = Background({"waits": (signal.pause, {})})
    print("started", flush=True)
    signal.pause()
"""


def test_jobs_return_by_name_and_all_but_the_first_stand_back():
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert Background({"a": PRIORITY, "b": PRIORITY}).wait() == {"a": own, "b": min(own + 10, 19)}


def test_an_error_in_a_job_is_raised_where_one_waits():
    with pytest.raises(FileNotFoundError, match="no such file"):
        Background({"bad": (os.stat, {"path": "no such file"})}).wait()


def test_the_processes_end_with_the_one_that_started_them(tmp_path):
    script = tmp_path / "paused.py"
    script.write_text(PAUSED)
    started = subprocess.Popen(
        [sys.executable, script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert started.stdout.readline() == "started\n"
        children = psutil.Process(started.pid).children(recursive=True)
        assert children
    finally:
        started.kill()
        started.wait()
    assert not psutil.wait_procs(children, timeout=60)[1]  # none is alive
