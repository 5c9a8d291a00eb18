"""The plain connector: matrices with a GELU between (LLaVA-1.5, arXiv 2310.03744). Notebook 02."""

from torch import nn


def mlp(vision_width: int, llm_width: int, depth: int) -> nn.Sequential:
    """`depth` matrices with a GELU between each two."""
    layers = [nn.Linear(vision_width, llm_width)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(llm_width, llm_width)]
    return nn.Sequential(*layers)
