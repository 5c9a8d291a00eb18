"""Resamplers: learned latents read the patches of a clip, so that Q does not grow with S.

They map (B, S, D_v) to (B, Q, D) as every connector of `tlv.connectors` does. `naive_resampler` and
`group_resampler` are TinyLLaVA-Video's (arXiv 2501.15513, v1 and v2), `resampler` and `qformer`
TinyLLaVA Factory's (arXiv 2405.11788), `bench_resampler` the narrower one of the TinyLLaVA paper
(arXiv 2402.14289); state-dict names are the published ones where weights are.
Taught in notebook 02.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Blip2QFormerConfig, Blip2QFormerModel


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
    """All latents read all patches of the clip; nothing says where a patch was (Factory's)."""

    latent_std = 1.0

    def __init__(self, vision_width, llm_width, num_latents, num_layers, num_heads, head_dim,
                 position_dtype="float16"):
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

    def forward(self, x, lengths=None):
        """x (B, S, D_v), lengths: each clip's true S (None: all of it) -> (B, Q, D)."""
        return self.resample(self.media(self.linear(x)), mark(lengths, x))

    def media(self, x):
        """What is read: (B, S, D) -> (B, S, D)."""
        return x

    def num_tokens(self, num_patches: int) -> int:
        return len(self.latents)


def mark(lengths, x):
    """(B, S) bool: which places of x (B, S, ...) a clip of each length fills; None: all of them."""
    if lengths is None or all(length == x.shape[1] for length in lengths):
        return None
    lengths = torch.tensor(lengths, device=x.device)
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


class NaiveResampler(Resampler):
    """All latents read all patches of the clip; positions are added to the patches."""

    def media(self, x):
        return x + self.positions(x)


class GroupResampler(Resampler):
    """G groups of consecutive patches, each read apart by the same latents and layers.

    Q = G * latents. Positions are added to the output, after the last norm. Groups are chunks of
    the token sequence: they end on frame borders only where S / G is a multiple of N.
    """

    def __init__(self, *args, num_groups, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_groups = num_groups

    def split(self, num_patches: int) -> list[int]:
        """Lengths of the groups of a clip."""
        return group_sizes(num_patches, self.num_groups)

    def forward(self, x, lengths=None):
        """x (B, S, D_v), lengths: each clip's true S (None: all of it) -> (B, Q, D)."""
        x = self.linear(x)  # (B, S, D)
        sizes = [self.split(length) for length in lengths or [x.shape[1]] * len(x)]
        y = self.resample(*self._fold(x, sizes))  # (groups of all clips, latents, D)
        y = y.split([len(parts) for parts in sizes])
        y = pad_sequence([groups.flatten(0, 1) for groups in y], batch_first=True)  # (B, Q, D)
        return y + self.positions(y)

    def _fold(self, x, sizes):
        """Groups become rows of the batch; groups of unequal length are padded and marked."""
        lengths = sum(sizes, [])
        if set(lengths) == {lengths[0]} and lengths[0] * len(sizes[0]) == x.shape[1]:
            return x.reshape(len(lengths), -1, x.shape[-1]), None
        groups = [
            group
            for clip, parts in zip(x, sizes, strict=True)
            for group in clip[: sum(parts)].split(parts)
        ]
        media = pad_sequence(groups, batch_first=True)  # (groups of all clips, n, D)
        return media, mark(lengths, media)

    def num_tokens(self, num_patches: int) -> int:
        return len(self.split(num_patches)) * len(self.latents)


def group_sizes(num_patches: int, num_groups: int) -> list[int]:
    """Lengths of the groups: equal but for one patch, the longer ones first."""
    size, rest = divmod(num_patches, num_groups)
    return [size + 1] * rest + [size] * (num_groups - rest)


class FrameResampler(GroupResampler):
    """Every frame is a group: as many video tokens per frame as there are latents.

    What an image model does with a video. As many frames as groups, and it is a group resampler.
    """

    def __init__(self, *args, patches_per_frame, **kwargs):
        super().__init__(*args, num_groups=None, **kwargs)
        self.patches_per_frame = patches_per_frame

    def split(self, num_patches):
        return [self.patches_per_frame] * (num_patches // self.patches_per_frame)


class BenchResampler(nn.Module):
    """Narrow latents that read the patches alone, not each other; then one matrix to D.

    The resampler that the TinyLLaVA paper compares the MLP with (24.1 million parameters from
    CLIP-L to TinyLlama; width 768, 12 heads, 3 layers, 128 latents). No weights were released.
    """

    latent_std = 1.0

    def __init__(self, vision_width, llm_width, num_latents, num_layers, num_heads, width):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([CrossAttention(vision_width, width, num_heads), feed_forward(width)])
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, llm_width, bias=False)

    def forward(self, x, lengths=None):
        """x (B, S, D_v), lengths: each clip's true S (None: all of it) -> (B, Q, D)."""
        is_media, y = mark(lengths, x), self.latents.expand(len(x), -1, -1)  # (B, Q, width)
        for attend, forward in self.layers:
            y = y + attend(x, y, is_media)
            y = y + forward(y)
        return self.out(self.norm(y))  # (B, Q, D)

    def num_tokens(self, num_patches: int) -> int:
        return len(self.latents)


class CrossAttention(nn.Module):
    """Latents (B, q, width) ask, media (B, n, D_v) answer; both are normed first, no biases."""

    def __init__(self, vision_width, width, num_heads):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"connector_width = {width} is not divisible by resampler_heads = "
                             f"{num_heads}")
        self.num_heads = num_heads
        self.norm_media, self.norm_latents = nn.LayerNorm(vision_width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(vision_width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, media, latents, is_media=None):
        """is_media (B, n) bool, None: all of it -> (B, q, width)."""
        q, kv = self.to_q(self.norm_latents(latents)), self.to_kv(self.norm_media(media))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, ., width / h)
                   for x in (q, *kv.chunk(2, dim=-1)))
        mask = None if is_media is None else is_media[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, h, q, width / h)
        return self.to_out(y.transpose(1, 2).flatten(2))


class QFormer(nn.Module):
    """BERT whose every second layer also reads the patches (BLIP-2's), from scratch; then D.

    Published form: width 768, 12 layers, 12 heads, 128 queries, no BLIP-2 weights, BERT's dropout
    of a tenth in training, no affine terms in the first norm. No weights were released.
    """

    latent_std = 0.02

    def __init__(self, vision_width, llm_width, num_latents, num_layers, num_heads, width):
        super().__init__()
        config = Blip2QFormerConfig(
            hidden_size=width, num_hidden_layers=num_layers, num_attention_heads=num_heads,
            intermediate_size=4 * width, encoder_hidden_size=vision_width,
            cross_attention_frequency=2,
        )  # fmt: skip
        self.latents = nn.Parameter(self.latent_std * torch.randn(num_latents, width))
        self.norm = nn.LayerNorm(width, config.layer_norm_eps, elementwise_affine=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.bert = Blip2QFormerModel(config).encoder
        self.out = nn.Linear(width, llm_width)

    def forward(self, x, lengths=None):
        """x (B, S, D_v), lengths: each clip's true S (None: all of it) -> (B, Q, D)."""
        is_media, mask = mark(lengths, x), None
        if is_media is not None:
            lowest = torch.finfo(x.dtype).min
            mask = torch.where(is_media, 0.0, lowest).to(x.dtype)[:, None, None]  # (B, 1, 1, S)
        latents = self.norm(self.latents).expand(len(x), -1, -1)  # (B, Q, width)
        read = self.bert(
            self.dropout(latents), encoder_hidden_states=x, encoder_attention_mask=mask,
            query_length=self.num_tokens(0),
        )
        return self.out(read.last_hidden_state)  # (B, Q, D)

    def num_tokens(self, num_patches: int) -> int:
        return len(self.latents)


LATENTS = (Resampler, BenchResampler, QFormer)  # those with learned latents of their own
