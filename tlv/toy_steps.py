"""Optimizer steps of a backbone in the making: Muon and AdamW, their rates up and down.

Taught in notebook 00.
"""

import math

import torch

from tlv.optimizers import Muon, split_matrices

MUON_LR, ADAMW_LR = 2e-3, 1e-3  # peaks; of the layers' matrices, and of all else


def rated_steps(model, num_steps, hold: float = 0.0):
    """The optimizers, with a short warm-up and a cosine of their rates, one step at a time.

    Muon for the matrices of the layers, AdamW for all else. The rates stay at their peak for the
    share `hold` of the steps.
    """
    matrices, others = split_matrices(model)
    optimizers = {
        Muon(matrices, lr=MUON_LR, weight_decay=0.01): MUON_LR,
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.01): ADAMW_LR,
    }
    warmup = max(1, num_steps // 20)
    model.train()
    for step in range(num_steps):
        falling = max(0.0, step / num_steps - hold) / (1 - hold)
        share = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * falling)))
        for optimizer, peak in optimizers.items():
            optimizer.param_groups[0]["lr"] = peak * share
        yield step, optimizers


def take_step(model, optimizers) -> None:
    """One step along the gradients that `model` has, clipped."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
