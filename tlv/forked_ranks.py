"""Copies of this process that go on with its training together, one CPU thread each.

Where a step is many small products, two processes of one thread are faster than one of two: the
threads wait for each other after every product, the ranks once a step. Full stages are started by
`tlv.launch`; this is for a model in the making, whose optimizer every copy has. Notebook 00.
"""

import os
import sys
import tempfile
import traceback
from multiprocessing import get_context

import torch
import torch.distributed as dist

from tlv.background import end_with_parent


def run_forked(function, count: int):
    """function() here and in `count` - 1 copies of this process, as ranks of one group.

    Returns what it gives here. Before and after, this process is one rank, and the functions below
    change nothing.
    """
    if count == 1:
        return function()
    torch.set_num_threads(1)  # no other thread survives a fork
    with tempfile.TemporaryDirectory() as folder:
        group = dict(backend="gloo", init_method=f"file://{folder}/ranks", world_size=count)
        context = get_context("fork")
        others = [
            context.Process(target=_run_copy, args=(function, {**group, "rank": rank}))
            for rank in range(1, count)
        ]
        for other in others:
            other.start()
        try:
            found = _run(function, {**group, "rank": 0})
        finally:
            for other in others:
                other.join()
    for rank, other in enumerate(others, start=1):
        if other.exitcode:
            raise RuntimeError(f"rank {rank} failed with exit code {other.exitcode}; see above")
    return found


def rank_and_count() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_first(value):
    """The first rank's `value`, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def sum_gradients(model, loss: float) -> float:
    """Replace the gradient of every parameter by its sum over all ranks; returns that of `loss`."""
    if not dist.is_initialized():
        return loss
    parameters = list(model.parameters())
    total = torch.cat([p.grad.flatten() for p in parameters] + [torch.tensor([loss])])
    dist.all_reduce(total)
    parts = total[:-1].split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.grad.copy_(part.view_as(p))
    return total[-1].item()


def _run(function, group: dict):
    dist.init_process_group(**group)
    try:
        return function()
    finally:
        dist.destroy_process_group()


def _run_copy(function, group: dict) -> None:
    end_with_parent()
    try:
        _run(function, group)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # what is to be done at the end of a process is the original's to do
