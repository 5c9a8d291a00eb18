"""Which device to compute on: one answer for notebooks, trainer and commands."""

import torch


def find_device(name: str = "auto") -> str:
    """A torch device that can be used here, such as "cpu", "cuda" or "cuda:1".

    "auto" is the GPU where torch has one (CUDA or ROCm: what the trainer's ranks can use), else the
    CPU. Nothing is placed on it. Raises ValueError for a device that is not there. Taught in
    notebook 03.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        is_there = (device.index or 0) < torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):  # no such name; "meta", which holds no numbers
        is_there = False
    if not is_there:
        raise ValueError(f"device = {name!r} cannot be used here; take 'auto' or 'cpu'")
    return name
