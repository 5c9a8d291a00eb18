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
from tlv.ranks import ALONE, Ranks


def run_forked(function, count: int):
    """function(ranks) here and in `count` - 1 copies of this process, as ranks of one group.

    Returns what it gives here. Before and after, this process is one rank.
    """
    if count == 1:
        return function(ALONE)
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


def sum_gradients(model, ranks: Ranks) -> None:
    """Replace the gradient of every parameter by its sum over all ranks."""
    if ranks.world_size == 1:
        return
    parameters = list(model.parameters())
    total = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(total)
    for p, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(part.view_as(p))


def _run(function, group: dict):
    dist.init_process_group(**group)
    ranks = Ranks(group["rank"], group["world_size"], torch.device("cpu"), dist.group.WORLD)
    try:
        return function(ranks)
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
