"""Copies of a process that train on as ranks: equal to one process, and none outlives it."""

import subprocess
import sys
from multiprocessing import get_context

import psutil
import pytest
import torch

from tlv import ROOT
from tlv.background import Background
from tlv.forked_ranks import run_forked, sum_gradients
from tlv.optimizers import Muon
from tlv.ranks import ALONE

PAUSED = """
import os, signal
from tlv.forked_ranks import run_forked
run_forked(lambda ranks: (os.write(1, b"started\\n"), signal.pause()), 3)  # one write, whole
"""


def train(model, optimizers, rows, num_steps, ranks):
    """Losses of steps on rows that the first rank alone has."""
    losses = []
    for _ in range(num_steps):
        batch = ranks.share(rows if ranks.is_first else None)
        model.zero_grad()
        loss = model(torch.tensor(batch[ranks.rank :: ranks.world_size])).square().sum()
        loss.backward()
        sum_gradients(model, ranks)
        losses += ranks.sum(loss.item())
        for optimizer in optimizers:
            optimizer.step()
    return losses


def new_training():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return model, [Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01)]


def go_on(count: int) -> dict:
    """Six steps of one process beside three of one and three of `count` ranks."""
    rows = torch.randn(6, 4).tolist()
    alone, together = new_training(), new_training()
    expected = train(*alone, rows, 6, ALONE)
    losses = train(*together, rows, 3, ALONE)  # momentum and weights of these steps go along
    losses += run_forked(lambda ranks: train(*together, rows, 3, ranks), count)
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
               for model, _ in (alone, together)]  # fmt: skip
    left = len(psutil.Process().children())
    has_group = torch.distributed.is_initialized()
    return dict(expected=expected, losses=losses, weights=weights, left=left, has_group=has_group)


def fail(is_late: bool) -> None:
    """The second rank fails: while the first waits for it, or when the first has done its work."""
    first_is_done = get_context("fork").Event()

    def work(ranks):
        if ranks.is_first and is_late:
            first_is_done.set()
        elif ranks.is_first:
            ranks.share(None)
        else:
            assert not is_late or first_is_done.wait(60)
            raise OSError("the second rank's own words")

    run_forked(work, 2)


def elsewhere(function, **kwargs):
    """In a process of its own: one that has trained before keeps its process group."""
    return Background({"it": (function, kwargs)}).wait()["it"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_go_on_where_the_process_was_and_learn_what_it_would(count):
    found = elsewhere(go_on, count=count)
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)
    alone, together = found["weights"]
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert not found["has_group"] and found["left"] == 0


def test_an_error_on_another_rank_is_no_success_here(capfd):
    with pytest.raises(RuntimeError):
        elsewhere(fail, is_late=False)
    assert "the second rank's own words" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="rank 1 failed"):
        elsewhere(fail, is_late=True)


def test_no_copy_outlives_the_process():
    started = subprocess.Popen(
        [sys.executable, "-c", PAUSED], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert [started.stdout.readline() for _ in range(3)] == ["started\n"] * 3
        others = psutil.Process(started.pid).children(recursive=True)
        assert len(others) == 2
    finally:
        started.kill()
        started.wait()
    assert not psutil.wait_procs(others, timeout=60)[1]  # none is alive
