"""Processes beside a notebook: what they give back, what fails in them, and that none is left."""

import os
import subprocess
import sys

import psutil
import pytest

from tlv import ROOT
from tlv.background import Background, compute_ahead

PRIORITY = os.getpriority, {"which": os.PRIO_PROCESS, "who": 0}
PAUSED = """
import signal, sys
from tlv.background import Background, compute_ahead
if __name__ == "__main__":
    background = Background({"waits": (signal.pause, {})})
    ahead = compute_ahead(int, range(9))
    assert next(ahead) == 0
    print("started", flush=True)
    signal.pause()
"""


def test_jobs_return_by_name_and_all_but_the_first_stand_back():
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert Background({"a": PRIORITY, "b": PRIORITY}).wait() == {"a": own, "b": min(own + 10, 19)}


def test_an_error_in_a_job_is_raised_where_one_waits():
    with pytest.raises(FileNotFoundError, match="no such file"):
        Background({"bad": (os.stat, {"path": "no such file"})}).wait()


def niceness(number):
    return number, os.getpriority(os.PRIO_PROCESS, 0)


def test_items_are_computed_ahead_in_order_by_a_process_that_stands_back():
    lower = min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)
    assert list(compute_ahead(niceness, range(5), chunk=2)) == [(i, lower) for i in range(5)]
    with pytest.raises(ZeroDivisionError):
        list(compute_ahead((1).__truediv__, [2, 0]))


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
        assert len(children) > 2  # the job, the helper, and what spawning takes
    finally:
        started.kill()
        started.wait()
    assert not psutil.wait_procs(children, timeout=60)[1]  # none is alive
