"""What is tuned and how fast: trainable parts, learning-rate groups, the schedule.

A recipe is an explicit list of parts with a peak learning rate each; a part without a rate is
frozen. Source: TinyLLaVA-Video section 3 (stage 1: connector; stage 2: connector and LLM).
Taught in notebooks 03 and 04.
"""

import math

from tlv.config import PARTS

MODULES = {"connector": "connector", "llm": "language_model", "vision": "vision_encoder"}


def part_module(model, part: str):
    """The model's child that is `part`, one of the keys of MODULES."""
    if part not in MODULES:
        raise KeyError(f"part {part!r} is unknown; parts are {', '.join(MODULES)}")
    return getattr(model, MODULES[part])


def set_trainable(model, trainable) -> dict[str, int]:
    """Freeze everything but the parts named; return the number of trained parameters per part."""
    counts = {}
    for part in PARTS:
        module = part_module(model, part).requires_grad_(part in trainable)
        counts[part] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return counts


def parameter_groups(model, learning_rates: dict, weight_decay: float) -> list[dict]:
    """AdamW groups: per trained part the matrices (decayed) and the biases and norms (not).

    learning_rates: peak rate per part, None = frozen. A group's `peak` feeds the schedule.
    """
    groups = []
    for part, peak in learning_rates.items():
        if peak is None:
            continue
        params = [p for p in part_module(model, part).parameters() if p.requires_grad]
        matrices = [p for p in params if p.ndim >= 2]
        vectors = [p for p in params if p.ndim < 2]  # biases and the affine terms of norms
        for members, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if members:
                groups.append({"params": members, "lr": peak, "weight_decay": decay,
                               "part": part, "peak": peak})
    return groups


def count_warmup_steps(warmup_ratio: float, num_steps: int) -> int:
    """ceil(ratio * steps), as the published recipe rounds it."""
    return math.ceil(warmup_ratio * num_steps)


def learning_rate(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear from 0 over `warmup_steps`, then half a cosine to 0 at `num_steps`.

    step counts optimizer steps from 0. A pure function: nothing of it has to be saved.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
