"""Vision encoders: frames -> patch features, through transformers' Auto classes.

A frame's features are `hidden_states[feature_layer]` of the encoder (-2: the input of its last
layer), without final norm and pooling. Source: LLaVA (arXiv 2310.03744), TinyLLaVA-Video section 1.
Taught in notebook 02.
"""

import torch
from torch import nn
from transformers import AutoModel

from tlv.pretrained import load_pretrained, read_config


def vision_part(config):
    """The image half of a config: that of a SigLIP or CLIP pair, or the config itself."""
    return getattr(config, "vision_config", config)


def load_vision_encoder(path, dtype=torch.float32, what: str = "vision_dir") -> nn.Module:
    """The image encoder of a folder. Of an image-text pair (SigLIP, CLIP) the text half is left."""
    config = vision_part(read_config(path, what))
    return load_pretrained(AutoModel, path, what, dtype, config=config)


def encode_frames(encoder, pixels, feature_layer: int = -2, drop_first_patch: bool = False):
    """pixels (T, C, H, W) -> features (T, N, D_v), in the encoder's dtype.

    `drop_first_patch` leaves out position 0: CLIP's class token, or, as TinyLLaVA-Video does with
    SigLIP (which has none), the top left patch: 728 of 729 stay.
    """
    states = encoder(pixels.to(encoder.dtype), output_hidden_states=True).hidden_states
    return states[feature_layer][:, 1:] if drop_first_patch else states[feature_layer]


def trace_encoder(config, feature_layer: int = -2, drop_first_patch: bool = False):
    """What an encoder of this config would give, computed without numbers (on the meta device).

    Returns features (1, N, D_v) of one frame and the encoder.
    """
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
        size = config.image_size
        pixels = torch.zeros(1, config.num_channels, size, size)
        return encode_frames(encoder, pixels, feature_layer, drop_first_patch), encoder


def count_patches(config, drop_first_patch: bool = False) -> int:
    """Features per frame (N) that reach the connector."""
    return trace_encoder(config, drop_first_patch=drop_first_patch)[0].shape[1]


@torch.enable_grad()
def count_unseen(config, feature_layer: int = -2) -> int:
    """Parameters that the features do not depend on: no gradient reaches them."""
    features, encoder = trace_encoder(config, feature_layer)
    features.sum().backward()
    return sum(p.numel() for p in encoder.parameters() if p.grad is None)
