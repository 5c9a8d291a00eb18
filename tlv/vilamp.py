"""ViLAMP's connector: every patch of a keyframe, and one token for every other frame.

(T, N, D_v) with K keyframes becomes (K * P + T - K, D) video tokens in order of time, where P <= N
is what pooling leaves of a keyframe. Which frames are keyframes is decided before
(`tlv.keyframes`). Source: ViLAMP (arXiv 2504.02438) section 4.3; its code has one MLP for both
kinds of token and merges behind it. Taught in notebook 06.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tlv.keyframes import count_clip_tokens
from tlv.merging import build_merging, merge_frames
from tlv.mlp import mlp


class Vilamp(nn.Module):
    """Two MLPs, for the patches of keyframes and for merged frames, and a form of merging.

    `keyframe_grid` is the side of the grid that a keyframe is pooled to, 0 for none: 14 of SigLIP's
    27 in the published code, 196 tokens in place of 729.
    """

    def __init__(self, vision_width, llm_width, num_keyframes, patches_per_frame, query_width,
                 keyframe_grid=0, merging="learned", merging_width=256):
        super().__init__()
        self.num_keyframes, self.patches_per_frame = num_keyframes, patches_per_frame
        self.side = math.isqrt(patches_per_frame)
        if keyframe_grid and self.side**2 != patches_per_frame:
            raise ValueError(f"keyframe_grid = {keyframe_grid}: pooling needs a square grid of "
                             f"patches, but a frame has {patches_per_frame}; take 0 (no pooling)")
        if keyframe_grid > self.side:
            raise ValueError(f"keyframe_grid = {keyframe_grid}, but a frame is a grid of "
                             f"{self.side} x {self.side} patches; take fewer, or 0 (no pooling)")
        self.keyframe_grid = keyframe_grid
        self.tokens_per_keyframe = keyframe_grid**2 or patches_per_frame  # P
        self.tokens_per_frame = int(merging != "drop")  # of the other frames
        self.keyframe_mlp = mlp(vision_width, llm_width, 2)
        self.frame_mlp = mlp(vision_width, llm_width, 2)
        self.merging = build_merging(merging, vision_width, query_width, merging_width)

    def num_tokens(self, num_patches: int) -> int:
        """Video tokens of a clip; it has min(T, num_keyframes) keyframes."""
        num_frames = num_patches // self.patches_per_frame
        return count_clip_tokens(num_frames, self.num_keyframes, self.tokens_per_keyframe,
                            self.tokens_per_frame)

    def forward(self, clips, keyframes, queries) -> list[torch.Tensor]:
        """clips: (T, N, D_v) each, keyframes: (K,) each, queries (B, D_q) -> (S, D) each.

        Every MLP is called once, whatever the clips are, so that parallel ranks keep step.
        """
        merged = [merge_frames(self.merging, clip, keys, query)
                  for clip, keys, query in zip(clips, keyframes, queries, strict=True)]
        patches = [self.pool(clip[keys.to(clip.device)])
                   for clip, keys in zip(clips, keyframes, strict=True)]
        others = self.frame_mlp(torch.cat(merged)).split([len(rows) for rows in merged])
        keys = self.keyframe_mlp(torch.cat(patches)).split([len(rows) for rows in patches])
        return [self._interleave(*parts)
                for parts in zip(clips, keyframes, keys, others, strict=True)]

    def _interleave(self, clip, keyframes, keys, others):
        """Tokens of keyframes (K, P, D) and of the others (T - K, D), in order -> (S, D)."""
        is_key = torch.zeros(len(clip), dtype=torch.bool)
        is_key[keyframes] = True
        counts = torch.where(is_key, self.tokens_per_keyframe, self.tokens_per_frame)  # (T,)
        of_key = is_key.repeat_interleave(counts).to(clip.device)  # (S,)
        tokens = keys.new_empty(len(of_key), keys.shape[-1])  # (S, D)
        tokens[of_key], tokens[~of_key] = keys.flatten(0, 1), others
        return tokens

    def project(self, is_keyframe: bool, rows):
        """What `tlv.merging.MergeStream` gives -> video tokens: (N, D_v) -> (P, D), (n, D_v) ->
        (n, D)."""
        return self.keyframe_mlp(self.pool(rows[None])[0]) if is_keyframe else self.frame_mlp(rows)

    def pool(self, patches):
        """Bilinear, over the grid: (K, N, D_v) -> (K, P, D_v)."""
        if not self.keyframe_grid:
            return patches
        grid = patches.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)  # (K, D_v, h, w)
        size = (self.keyframe_grid, self.keyframe_grid)
        return F.interpolate(grid, size, mode="bilinear").flatten(2).mT  # (K, P, D_v)
