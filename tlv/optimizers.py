"""Optimizers by name: AdamW, as published, and Muon, which learns faster from little.

Muon (K. Jordan et al., 2024, "Muon: An optimizer for hidden layers"; its scale after arXiv
2502.16982) replaces a matrix's momentum by the nearest matrix whose singular values are all one,
so that no direction of it is learnt much slower than another. It is for the matrices between
layers alone; embeddings, heads, biases and norms stay with AdamW. Taught in notebook 04.
"""

import re

import torch

OPTIMIZERS = ("adamw", "muon")
LAYER = re.compile(r"\.layers?\.")


def split_matrices(model) -> tuple[list, list]:
    """The parameters of `model`: matrices that lie in a stack of layers, and all others."""
    named = list(model.named_parameters())
    inside = {name for name, p in named if p.ndim == 2 and LAYER.search(name)}
    return [p for name, p in named if name in inside], [p for n, p in named if n not in inside]


def new_optimizer(name: str, model, groups: list[dict], betas=(0.9, 0.999)):
    """An optimizer of the parameter groups of `tlv.recipes.parameter_groups`, by its name."""
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas)
    if name != "muon":
        raise ValueError(f"optimizer {name!r} is unknown; known are {', '.join(OPTIMIZERS)}")
    inside = {id(p) for p in split_matrices(model)[0]}
    split = [], []  # groups of matrices, groups of all else
    for group in groups:
        for part, is_matrix in zip(split, (True, False), strict=True):
            members = [p for p in group["params"] if (id(p) in inside) == is_matrix]
            if members:
                part.append({**group, "params": members})
    matrices, others = split
    parts = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(torch.optim.AdamW(others, betas=betas))
    return OptimizerSet(parts)


class OptimizerSet(torch.optim.Optimizer):
    """Optimizers with parameters of their own, used as one: what DeepSpeed's engine is given."""

    def __init__(self, parts: list):
        super().__init__([p for part in parts for g in part.param_groups for p in g["params"]], {})
        self.parts = parts
        self._collect()

    def _collect(self):
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._collect()  # loading makes new groups
