"""Connectors: patch features of a whole clip -> video tokens of the LLM's width.

Every connector maps (B, S, D_v) to (B, Q, D), where S = T * N patches of a clip. The two resamplers
are TinyLLaVA-Video's (arXiv 2501.15513, v1 naive, v2 group) with its state-dict names; `linear` and
`mlp2x_gelu` are LLaVA's (arXiv 2310.03744) and keep one video token per patch.
Taught in notebook 02.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence


class Linear(nn.Linear):
    """One matrix: (B, S, D_v) -> (B, S, D). Keeps every patch."""

    def forward(self, x, lengths=None):
        """`lengths` is the clips' true S; rows beyond it are computed and mean nothing."""
        return super().forward(x)  # (B, S, D)

    def num_tokens(self, num_patches: int) -> int:
        """Video tokens that a clip of `num_patches` patches becomes."""
        return num_patches


class Mlp(nn.Sequential):
    """Two matrices with a GELU between: (B, S, D_v) -> (B, S, D). Keeps every patch."""

    def __init__(self, vision_width, llm_width):
        super().__init__(
            nn.Linear(vision_width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )

    def forward(self, x, lengths=None):
        return super().forward(x)  # (B, S, D)

    def num_tokens(self, num_patches: int) -> int:
        return num_patches


class PerceiverAttention(nn.Module):
    """Latents ask; keys and values are the media followed by the latents themselves.

    Source: Flamingo (arXiv 2204.14198), figure 5, with several heads; no biases, no dropout.
    """

    def __init__(self, dim, num_heads, head_dim):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, media, latents, is_media=None):
        """media (B, n, D), latents (B, q, D), is_media (B, n) bool or None = all -> (B, q, D)."""
        media, latents = self.norm_media(media), self.norm_latents(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat([media, latents], dim=1)).chunk(2, dim=-1)  # (B, n + q, inner)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if is_media is not None:
            is_media = F.pad(is_media, (0, latents.shape[1]), value=True)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=is_media)  # (B, h, q, head_dim)
        return self.to_out(y.transpose(1, 2).flatten(2))


def feed_forward(dim: int) -> nn.Sequential:
    """LayerNorm, four times the width, exact GELU, back; the matrices have no bias."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, 4 * dim, bias=False),
        nn.GELU(),
        nn.Linear(4 * dim, dim, bias=False),
    )


def position_encoding(num_positions, dim, dtype="float16", device=None) -> torch.Tensor:
    """Sines (even columns) and cosines (odd ones) of the position -> (num_positions, dim) float32.

    The values are rounded to `dtype`: the published weights were trained with a table made in
    float16, up to 2.6e-4 away from the exact one.
    """
    position = torch.arange(num_positions, device=device, dtype=torch.float32)
    column = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
    angle = position[:, None] * torch.exp(column * -(math.log(10_000.0) / dim))  # (n, dim / 2)
    table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (n, dim)
    return table[:, :dim].to(POSITION_DTYPES[dtype]).float()


POSITION_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Resampler(nn.Module):
    """What both resamplers share: learned latents that read media through attention layers."""

    def __init__(self, vision_width, llm_width, num_latents, num_layers, num_heads, head_dim,
                 position_dtype):
        super().__init__()
        if position_dtype not in POSITION_DTYPES:
            raise ValueError(f"position_dtype {position_dtype!r} is unknown; "
                             f"known are {', '.join(POSITION_DTYPES)}")
        self.position_dtype = position_dtype
        self.latents = nn.Parameter(torch.randn(num_latents, llm_width))
        self.linear = nn.Linear(vision_width, llm_width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(llm_width, num_heads, head_dim),
                           feed_forward(llm_width)])
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(llm_width)

    def positions(self, x):
        """The encoding of (B, n, D), in its dtype and on its device -> (n, D)."""
        return position_encoding(*x.shape[1:], self.position_dtype, x.device).to(x.dtype)

    def resample(self, media, is_media=None):
        """media (B, n, D), is_media (B, n) bool or None = all -> (B, q, D)."""
        latents = self.latents.expand(len(media), -1, -1)  # (B, q, D)
        for attention, forward in self.layers:
            latents = attention(media, latents, is_media) + latents
            latents = forward(latents) + latents
        return self.norm(latents)


def _mark(lengths, longest, device):
    """(B, longest) bool: which places a sequence of each length fills; None when all are full."""
    if all(length == longest for length in lengths):
        return None
    lengths = torch.tensor(lengths, device=device)
    return torch.arange(longest, device=device) < lengths[:, None]


class NaiveResampler(Resampler):
    """All latents read all patches of the clip; positions are added to the patches."""

    def forward(self, x, lengths=None):
        """x (B, S, D_v), lengths: each clip's true S (None: all of it) -> (B, Q, D)."""
        x = self.linear(x)  # (B, S, D)
        is_media = None if lengths is None else _mark(lengths, x.shape[1], x.device)
        return self.resample(x + self.positions(x), is_media)

    def num_tokens(self, num_patches: int) -> int:
        return len(self.latents)


class GroupResampler(Resampler):
    """G groups of consecutive patches, each read apart by the same latents and layers.

    Q = G * latents. Positions are added to the output, after the last norm. Groups are chunks of
    the token sequence: they end on frame borders only where S / G is a multiple of N.
    """

    def __init__(self, *args, num_groups, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_groups = num_groups

    def forward(self, x, lengths=None):
        """x (B, S, D_v), lengths: each clip's true S (None: all of it) -> (B, Q, D)."""
        x = self.linear(x)  # (B, S, D)
        lengths = lengths or [x.shape[1]] * len(x)
        media, is_media = self._fold(x, lengths)  # (B * G, n, D)
        y = self.resample(media, is_media).unflatten(0, (-1, self.num_groups))  # (B, G, Q / G, D)
        y = y.flatten(1, 2)  # (B, Q, D)
        return y + self.positions(y)

    def _fold(self, x, lengths):
        """Groups become rows of the batch; groups of unequal length are padded and marked."""
        if all(length == x.shape[1] and length % self.num_groups == 0 for length in lengths):
            return x.reshape(len(x) * self.num_groups, -1, x.shape[-1]), None
        sizes = [group_sizes(length, self.num_groups) for length in lengths]
        groups = [
            group
            for clip, length, parts in zip(x, lengths, sizes, strict=True)
            for group in clip[:length].split(parts)
        ]
        media = pad_sequence(groups, batch_first=True)  # (B * G, n, D)
        return media, _mark(sum(sizes, []), media.shape[1], x.device)

    def num_tokens(self, num_patches: int) -> int:
        return self.num_groups * len(self.latents)


def group_sizes(num_patches: int, num_groups: int) -> list[int]:
    """Lengths of the groups: equal but for one patch, the longer ones first."""
    size, rest = divmod(num_patches, num_groups)
    return [size + 1] * rest + [size] * (num_groups - rest)


def _linear(vision_width, llm_width, **_):
    return Linear(vision_width, llm_width)


def _mlp(vision_width, llm_width, **_):
    return Mlp(vision_width, llm_width)


def _naive(num_queries, num_groups, **sizes):
    return NaiveResampler(num_latents=num_queries, **sizes)


def _group(num_queries, num_groups, **sizes):
    if num_queries % num_groups:
        raise ValueError(f"num_queries = {num_queries} is not divisible by num_groups = "
                         f"{num_groups}: every group gives the same number of video tokens")
    return GroupResampler(num_latents=num_queries // num_groups, num_groups=num_groups, **sizes)


CONNECTORS = {
    "linear": _linear,
    "mlp2x_gelu": _mlp,
    "naive_resampler": _naive,
    "group_resampler": _group,
}


def build_connector(name, *, vision_width, llm_width, num_queries, num_groups, num_layers,
                    num_heads=8, head_dim=64, position_dtype="float16") -> nn.Module:
    """A connector by name; what a connector does not have (queries, groups) it ignores.

    Raises ValueError for an unknown name, and for queries that do not divide into the groups.
    """
    if name not in CONNECTORS:
        raise ValueError(f"connector {name!r} is unknown; known are {', '.join(CONNECTORS)}")
    return CONNECTORS[name](
        vision_width=vision_width, llm_width=llm_width, num_queries=num_queries,
        num_groups=num_groups, num_layers=num_layers, num_heads=num_heads, head_dim=head_dim,
        position_dtype=position_dtype,
    )
