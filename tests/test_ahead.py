"""Clips read ahead come in order, their errors in place, and the threads are given back."""

import threading

import torch

from tlv.ahead import read_ahead
from tlv.video import VideoError


def test_order_errors_and_threads():
    torch.set_num_threads(2)
    seen = []

    def read(name):
        if name == 3:
            raise VideoError("3.mp4", "broken")
        return name * 10

    for found in read_ahead(read, range(9)):
        seen.append(found)
        assert torch.get_num_threads() == 1
    assert isinstance(seen.pop(3), VideoError) and seen == [0, 10, 20, 40, 50, 60, 70, 80]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert list(read_ahead(read, [1])) == [10] and torch.get_num_threads() == 1


def test_some_are_read_before_they_are_asked_for():
    started = [threading.Event() for _ in range(4)]
    reader = read_ahead(lambda k: started[k].set() or k, range(4), num_ahead=2)
    assert next(reader) == 0
    assert started[1].wait(10) and started[2].wait(10)  # while the caller still works on the first
    assert not started[3].is_set()
    assert list(reader) == [1, 2, 3]
