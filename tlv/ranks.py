"""The process group: who this rank is, where it computes, and sums over all ranks.

One process without a launcher is one rank. On the CPU nothing is compiled: the only operation
that DeepSpeed would build there is switched off, and gloo serves instead. Notebook 03.
"""

import os
import random
import socket
import threading
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


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

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in double precision."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value) -> list:
        """`value` of every rank, in rank order."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share(self, value):
        """The first rank's `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]


def start_ranks(device: str, num_threads: int, seed: int) -> Ranks:
    """Join the process group, fix threads and seeds. device: "auto", "cpu" or "cuda"."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda' but this machine has no usable GPU; take 'auto' or 'cpu'")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    os.environ["DS_ACCELERATOR"] = kind  # read when deepspeed is first imported
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"),
                        ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    if kind == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no compiler needed
        torch.set_num_threads(num_threads)
        where = torch.device("cpu")
    else:
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    deepspeed.init_distributed(dist_backend="gloo" if kind == "cpu" else "nccl")
    return Ranks(dist.get_rank(), dist.get_world_size(), where)


def stop_ranks(engine) -> None:
    """Leave in order (a bare end right after ZeRO-3 was seen to abort): wait, take down, leave."""
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


def end_with_parent() -> None:
    """Leave when the launcher dies, also by kill -9: it holds the other end of our stdin."""
    def watch():
        os.read(0, 1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
