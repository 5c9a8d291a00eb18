"""Copies of a process that train on as ranks: equal to one process, and none outlives it."""

import subprocess
import sys

import psutil
import pytest
import torch

from tlv import ROOT
from tlv.forked_ranks import rank_and_count, run_forked, share_first, sum_gradients
from tlv.optimizers import Muon

PAUSED = """
import signal
from tlv.forked_ranks import run_forked
run_forked(lambda: (print("started", flush=True), signal.pause()), 3)
"""


def train(model, optimizers, rows, num_steps):
    """Losses of steps on rows that the first rank alone has."""
    losses = []
    rank, count = rank_and_count()
    for _ in range(num_steps):
        batch = share_first(rows if rank == 0 else None)
        model.zero_grad()
        loss = model(torch.tensor(batch[rank::count])).square().sum()
        loss.backward()
        losses.append(sum_gradients(model, loss.item()))
        for optimizer in optimizers:
            optimizer.step()
    return losses


def new_training():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return model, [Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_go_on_where_the_process_was_and_learn_what_it_would(count):
    rows = torch.randn(6, 4).tolist()
    alone, together = new_training(), new_training()
    expected = train(*alone, rows, 6)
    losses = train(*together, rows, 3)  # momentum and weights of these steps go along
    losses += run_forked(lambda: train(*together, rows, 3), count)
    assert losses == pytest.approx(expected, rel=1e-5)
    for one, other in zip(alone[0].parameters(), together[0].parameters(), strict=True):
        torch.testing.assert_close(other, one)
    assert rank_and_count() == (0, 1)
    assert not psutil.Process().children()


def test_an_error_on_another_rank_is_no_success_here(capfd):
    def fail():
        if rank_and_count()[0] == 1:
            raise OSError("the second rank's own words")
        share_first(None)

    def fail_at_the_end():
        if rank_and_count()[0] == 1:
            raise OSError("too late")
        return 1

    with pytest.raises(RuntimeError):
        run_forked(fail, 2)
    assert "the second rank's own words" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="rank 1"):
        run_forked(fail_at_the_end, 2)


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
