"""One rule says where to compute, and a device that is not there is refused by name."""

import pytest
import torch

from tlv.devices import find_device


def pretend(num_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    pretend(0, monkeypatch)
    assert find_device() == find_device("cpu") == "cpu"
    pretend(2, monkeypatch)
    assert [find_device(n) for n in ("auto", "cpu", "cuda:1")] == ["cuda", "cpu", "cuda:1"]


@pytest.mark.parametrize("name, num_gpus",
                         [("cuda", 0), ("cuda:2", 2), ("cpu:1", 2), ("meta", 2), ("gpu", 2)])
def test_a_device_that_is_not_there(name, num_gpus, monkeypatch):
    pretend(num_gpus, monkeypatch)
    with pytest.raises(ValueError, match=f"device = '{name}' cannot be used here; take 'auto' or"):
        find_device(name)
