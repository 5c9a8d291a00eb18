"""Processes beside a notebook: what they give back, what fails in them, and that none is left."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from tlv import ROOT
from tlv.background import Background, compute_ahead, map_forked

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


def test_copies_compute_in_order_what_this_process_would():
    weights = torch.arange(3.0)

    def look(item):
        return item, os.getpid(), torch.get_num_threads(), weights * item

    torch.set_num_threads(2)
    found = list(map_forked(look, range(9), 2, chunk=2))
    assert [item for item, *_ in found] == list(range(9))
    pids = {pid for _, pid, _, _ in found}
    assert os.getpid() not in pids and {threads for _, _, threads, _ in found} == {1}
    assert all(torch.equal(product, weights * item) for item, *_, product in found)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert [pid for _, pid, *_ in map_forked(look, range(2), 1)] == [os.getpid()] * 2


def test_an_error_in_a_copy_is_raised_here_and_a_process_with_a_gpu_is_not_copied(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        list(map_forked((1).__truediv__, [2, 0], 2))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="num_processes = 2.*take 1"):
        list(map_forked(int, [2, 0], 2))


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
