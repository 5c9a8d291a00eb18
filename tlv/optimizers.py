"""Optimizers by name: AdamW, as published, and Muon, which learns faster from little.

Muon (K. Jordan et al., 2024, "Muon: An optimizer for hidden layers"; its scale after arXiv
2502.16982) replaces a matrix's momentum by the nearest matrix whose singular values are all one,
so that no direction of it is learnt much slower than another. It is for the matrices between
layers alone; embeddings, heads, biases and norms stay with AdamW. Taught in notebook 04.

torch has a Muon too. It multiplies in bfloat16, which takes twenty times as long on a CPU that has
none (most laptops), and every rank does all of its work.
"""

import math
import re

import torch
import torch.distributed as dist

OPTIMIZERS = ("adamw", "muon")
LAYER = re.compile(r"\.layers?\.")
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # of X, X^3 and X^5: small singular values grow fastest
NUM_PRODUCTS = 5


def split_matrices(model) -> tuple[list, list]:
    """The parameters of `model`: matrices that lie in a stack of layers, and all others."""
    named = list(model.named_parameters())
    inside = {name for name, p in named if p.ndim == 2 and LAYER.search(name)}
    return [p for name, p in named if name in inside], [p for n, p in named if n not in inside]


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """(m, n) -> (m, n): the same singular vectors, all singular values near one (0.7 to 1.2)."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.float().T if is_tall else matrix.float()  # (short, long)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NUM_PRODUCTS):
        gram = x @ x.T  # (short, short)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix of the momentum, as long as a step of AdamW.

    Of several ranks, which must hold the same gradients, each orthogonalizes its share for all.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults)
        flat = [p.shape for group in self.param_groups for p in group["params"] if p.ndim != 2]
        if flat:
            raise ValueError(f"Muon is for matrices; {list(flat[0])} is no matrix's shape")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            updates = self._updates(matrices, group["momentum"])
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                length = 0.2 * math.sqrt(max(matrix.shape))  # an entry of AdamW's step is near 0.2
                matrix.add_(update, alpha=-group["lr"] * length)

    def _updates(self, matrices, momentum: float) -> list[torch.Tensor]:
        has_ranks = dist.is_initialized() and dist.get_world_size() > 1
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if has_ranks else (0, 1)
        updates = [torch.zeros_like(matrix, dtype=torch.float32) for matrix in matrices]
        for number, (matrix, update) in enumerate(zip(matrices, updates, strict=True)):
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix.grad)
            average = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
            if number % world_size == rank:
                update.copy_(orthogonalize(matrix.grad.lerp(average, momentum)))
        if has_ranks and updates:  # all but one rank add zeros
            shared = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(shared)
            parts = shared.split([update.numel() for update in updates])
            updates = [part.view_as(update) for part, update in zip(parts, updates, strict=True)]
        return updates


def new_optimizer(name: str, model, groups: list[dict]):
    """An optimizer of the parameter groups of `tlv.recipes.parameter_groups`, by its name."""
    if name == "adamw":
        return torch.optim.AdamW(groups)
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
        parts.append(Muon(matrices))
    if others:
        parts.append(torch.optim.AdamW(others))
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
