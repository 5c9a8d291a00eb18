"""Connectors: patch features of a whole clip -> video tokens of the LLM's width.

Every connector maps (B, S, D_v) to (B, Q, D), where S = T * N patches of a clip; a picture is a
clip of one frame. (`vilamp` alone wants frames, keyframes and a query: `tlv.vilamp`.) Those here
give every patch its token, or average patches; those that read the clip with learned latents are in
`tlv.resamplers`. `linear` is LLaVA's (arXiv 2304.08485), the MLP LLaVA-1.5's (arXiv 2310.03744),
`mof_mlp` the mixture of features' (arXiv 2401.06209). Taught in notebook 02.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from tlv.mlp import mlp
from tlv.resamplers import (
    BenchResampler,
    FrameResampler,
    GroupResampler,
    NaiveResampler,
    QFormer,
    Resampler,
)
from tlv.vilamp import Vilamp


class PerPatch(nn.Module):
    """A video token for every patch: (B, S, D_v) -> (B, S, D)."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, x, lengths=None):
        """`lengths` is the clips' true S; rows beyond it are computed and mean nothing."""
        return self.layers(x)  # (B, S, D)

    def num_tokens(self, num_patches: int) -> int:
        """Video tokens that a clip of `num_patches` patches becomes."""
        return num_patches


class MofMlp(nn.Module):
    """Two encoders' features, each through an MLP of its own, dealt out in turn:
    (B, S, D_1 + D_2) -> (B, 2 S, D)."""

    def __init__(self, vision_widths, llm_width):
        super().__init__()
        self.widths = tuple(vision_widths)
        self.mlps = nn.ModuleList(mlp(width, llm_width, 2) for width in vision_widths)

    def forward(self, x, lengths=None):
        parts = x.split(self.widths, dim=-1)
        tokens = [layers(part) for layers, part in zip(self.mlps, parts, strict=True)]
        return torch.stack(tokens, dim=2).flatten(1, 2)  # (B, 2 S, D)

    def num_tokens(self, num_patches: int) -> int:
        return 2 * num_patches


class MeanPool(nn.Module):
    """Averages over G stretches of time and a grid of places, then one matrix: Q = G * grid^2.

    With G = 1 and the encoder's own grid it is the mean over time. Only the matrix is learnt.
    """

    def __init__(self, vision_width, llm_width, num_groups, grid, patches_per_frame):
        super().__init__()
        self.shape, self.side = (num_groups, grid, grid), math.isqrt(patches_per_frame)
        self.linear = nn.Linear(vision_width, llm_width)

    def forward(self, x, lengths=None):
        """x (B, S, D_v), lengths: each clip's true S (None: all of it) -> (B, Q, D)."""
        lengths = lengths or [x.shape[1]] * len(x)
        pooled = [self._pool(clip[:length]) for clip, length in zip(x, lengths, strict=True)]
        return self.linear(torch.stack(pooled))  # (B, Q, D)

    def _pool(self, clip):
        volume = clip.unflatten(0, (-1, self.side, self.side)).permute(3, 0, 1, 2)  # (D_v, T, h, w)
        return F.adaptive_avg_pool3d(volume, self.shape).flatten(1).T  # (Q, D_v)

    def num_tokens(self, num_patches: int) -> int:
        return math.prod(self.shape)


# ---- by name --------------------------------------------------------------------------------


def _identity(o):
    if o["vision_width"] != o["llm_width"]:
        raise ValueError(f"connector 'identity' needs an encoder as wide as the LLM, but they are "
                         f"{o['vision_width']} and {o['llm_width']} wide; take 'linear'")
    return PerPatch(nn.Sequential())


def _mof(o):
    widths = o["vision_widths"]
    if len(widths) != 2:
        raise ValueError(f"connector 'mof_mlp' needs a mixture of two encoders (vision_dir and "
                         f"second_vision_dir), but there is {len(widths)}")
    return MofMlp(widths, o["llm_width"])


def _mean_pool(o):
    grid, side = math.isqrt(_per_group(o)), math.isqrt(o["patches_per_frame"])
    if side**2 != o["patches_per_frame"]:
        raise ValueError(f"connector 'mean_pool' needs a square grid of patches, but a frame has "
                         f"{o['patches_per_frame']}; drop_first_patch is for a class token, and "
                         "an encoder with one needs it")
    if grid**2 != _per_group(o):
        raise ValueError(f"connector 'mean_pool' averages over a square grid of places, but "
                         f"num_queries / num_groups = {_per_group(o)}; take a square number")
    return MeanPool(
        o["vision_width"], o["llm_width"], o["num_groups"], grid, o["patches_per_frame"]
    )


def _count(o, name: str) -> int:
    if o[name] < 1:
        raise ValueError(f"{name} = {o[name]} must be 1 or more")
    return o[name]


def _queries(o) -> int:
    return _count(o, "num_queries")


def _per_group(o) -> int:
    queries, groups = _queries(o), _count(o, "num_groups")
    if queries % groups:
        raise ValueError(f"num_queries = {queries} is not divisible by num_groups = {groups}: "
                         "every group gives the same number of video tokens")
    return queries // groups


def _wide(cls, **more):
    """A resampler as wide as the LLM; `more` are its options, computed from all sizes."""
    names = ("vision_width", "llm_width", "num_layers", "num_heads", "head_dim", "position_dtype")
    return lambda o: cls(
        **{name: o[name] for name in names}, **{key: value(o) for key, value in more.items()}
    )


def _narrow(cls):
    names = ("vision_width", "llm_width", "num_layers", "num_heads", "width")
    return lambda o: cls(**{name: o[name] for name in names}, num_latents=_queries(o))


def _vilamp(o):
    if not o["query_width"]:
        raise ValueError("connector 'vilamp' chooses frames by an image-text pair; name its folder "
                         "as selector_dir")
    names = ("vision_width", "llm_width", "num_keyframes", "patches_per_frame", "query_width",
             "keyframe_grid", "merging", "merging_width")
    return Vilamp(**{name: o[name] for name in names})


class Registry(dict):
    """Builders by name, none of which is replaced in silence."""

    def __setitem__(self, name, build):
        if name in self:
            raise ValueError(f"connector {name!r} is there already; take another name, or first "
                             f"del CONNECTORS[{name!r}]")
        super().__setitem__(name, build)


CONNECTORS = Registry({
    "identity": _identity,
    "linear": lambda o: PerPatch(mlp(o["vision_width"], o["llm_width"], 1)),
    "mlp{N}x_gelu": lambda o: PerPatch(mlp(o["vision_width"], o["llm_width"], o["depth"])),
    "mof_mlp": _mof,
    "mean_pool": _mean_pool,
    "resampler": _wide(Resampler, num_latents=_queries),
    "bench_resampler": _narrow(BenchResampler),
    "qformer": _narrow(QFormer),
    "naive_resampler": _wide(NaiveResampler, num_latents=_queries),
    "group_resampler": _wide(
        GroupResampler, num_latents=_per_group, num_groups=lambda o: o["num_groups"]
    ),
    "frame_resampler": _wide(
        FrameResampler, num_latents=_per_group, patches_per_frame=lambda o: o["patches_per_frame"]
    ),
    "vilamp": _vilamp,
})  # fmt: skip


def build_connector(name, *, vision_width, llm_width, num_queries, num_groups, num_layers,
                    num_heads=8, head_dim=64, width=768, position_dtype="float16",
                    patches_per_frame=None, vision_widths=(), num_keyframes=32, keyframe_grid=0,
                    query_width=0, merging="learned", merging_width=256) -> nn.Module:
    """A connector by name; what a connector does not have (queries, groups) it ignores.

    `width` is that of the narrow ones (bench_resampler, qformer), `patches_per_frame` (N) is needed
    by those that know frames (mean_pool, frame_resampler, vilamp), `vision_widths` by mof_mlp, all
    that follows by vilamp. Raises ValueError for an unknown name, and for sizes that do not fit.
    """
    options = dict(locals())
    depth = re.fullmatch(r"mlp([1-9])x_gelu", name)
    key = "mlp{N}x_gelu" if depth else name
    if key not in CONNECTORS or name == "mlp{N}x_gelu":
        raise ValueError(f"connector {name!r} is unknown; known are {', '.join(CONNECTORS)} "
                         "(N from 1 to 9)")
    return CONNECTORS[key]({**options, "depth": int(depth[1]) if depth else None})
