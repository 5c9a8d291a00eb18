"""The process group: who this rank is, where it computes, and sums over all ranks.

One process without a launcher is one rank. On the CPU nothing is compiled: the only operation
that DeepSpeed would build there is switched off, and gloo serves instead. Notebook 03.
"""

import os
import random
import socket
import threading
import warnings
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from tlv.devices import find_device

PATIENCE = timedelta(hours=2)  # of ranks that wait while one saves a large model to a slow disk


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Ranks:
    """This rank and how many there are."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in double precision."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value) -> list:
        """`value` of every rank, in rank order. It may be large: it never enters a GPU."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def share(self, value):
        """The first rank's `value`, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]


ALONE = Ranks(0, 1, torch.device("cpu"), None)  # a process that belongs to no group


def start_ranks(device: str, num_threads: int, seed: int) -> Ranks:
    """Join the process group, fix threads and seeds. device: "auto", "cpu" or "cuda"."""
    kind = find_device(device)
    os.environ["DS_ACCELERATOR"] = kind  # read when deepspeed is first imported
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19 calls torch functions by names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if kind == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no compiler needed
        where = torch.device("cpu")
    else:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(where)
    torch.set_num_threads(num_threads)
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    if not dist.is_initialized():
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"),
                            ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port()))):
            os.environ.setdefault(name, value)  # set already where a launcher started us
        backend = "gloo" if kind == "cpu" else "nccl"
        deepspeed.init_distributed(dist_backend=backend, timeout=PATIENCE)
    cpu_group = dist.group.WORLD
    if kind == "cuda":
        cpu_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), where, cpu_group)


def leave(ranks: Ranks) -> None:
    """End this process's part in the group, when everybody has come here.

    Once per process: DeepSpeed keeps the group, so a second run in one process joins it again.
    """
    ranks.barrier()
    dist.destroy_process_group()


def end_with_launcher() -> None:
    """Leave when the launcher dies, also by kill -9: it holds the other end of our stdin."""
    def watch():
        os.read(0, 1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
