"""Decode clips ahead of what works on them, so that no core waits for another.

Taught in notebook 01.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from tlv.video import VideoError


def read_ahead(read, names, num_readers: int = 1, num_ahead: int = 4):
    """Yields read(name) for every name in order, a few of them read early by `num_readers` threads;
    a VideoError in place of a clip that gave one.

    Until the last one torch computes with as many threads less, which are left to the decoders:
    threads that wait for each other on too few cores take twice as long.
    """

    def attempt(name):
        try:
            return read(name)
        except VideoError as error:
            return error

    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads - num_readers))
    try:
        with ThreadPoolExecutor(num_readers, initializer=torch.set_num_threads,
                                initargs=(1,)) as pool:  # fmt: skip
            waiting = deque()
            for name in names:
                waiting.append(pool.submit(attempt, name))
                if len(waiting) >= num_ahead + num_readers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(num_threads)
