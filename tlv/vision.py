"""Vision encoders: frames -> patch features, through transformers' Auto classes.

A frame's features are the encoder's hidden states at `feature_layer` (-2: the input of its last
layer), without final norm and pooling. CLIP, SigLIP, DINOv2, or a mixture of two of them.
Source: LLaVA (arXiv 2310.03744), mixture of features (arXiv 2401.06209), TinyLLaVA-Video section 1.
Taught in notebook 02.
"""

from contextlib import contextmanager

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from tlv.pretrained import ModelFolderError, load_pretrained, read_config


def vision_part(config):
    """The image half of a config: that of a SigLIP or CLIP pair, or the config itself."""
    return getattr(config, "vision_config", config)


def picture_size(config) -> int:
    """Side in pixels of the pictures that an encoder is shown.

    DINOv2 fits its positions to any size: published are positions for 518 and pictures of 224.
    """
    return getattr(config, "picture_size", None) or config.image_size


def load_vision_encoder(path, dtype=torch.float32, what: str = "vision_dir") -> nn.Module:
    """The vision encoder of a folder; of an image-text pair (SigLIP, CLIP) the seeing half."""
    config = vision_part(read_config(path, what))
    return load_pretrained(AutoModel, path, what, dtype, config=config)


# ---- a mixture of two -----------------------------------------------------------------------


@strict
class MixtureConfig(PreTrainedConfig):
    """Two encoders that see the same pixels (as CLIP's processor makes them, say)."""

    model_type = "tlv_mixture"
    sub_configs_defaults = {
        "first_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "second_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2"),
    }
    first_config: dict | PreTrainedConfig | None = None
    second_config: dict | PreTrainedConfig | None = None

    @property
    def parts(self):
        """The configs of both."""
        return self.first_config, self.second_config

    @property
    def widths(self) -> tuple[int, int]:
        return self.first_config.hidden_size, self.second_config.hidden_size

    @property
    def hidden_size(self) -> int:
        return sum(self.widths)

    @property
    def picture_size(self) -> int:
        return picture_size(self.first_config)

    @property
    def num_channels(self) -> int:
        return self.first_config.num_channels


class MixtureEncoder(PreTrainedModel):
    """Features of both encoders side by side: (T, C, H, W) -> (T, N, D_1 + D_2)."""

    config_class = MixtureConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: MixtureConfig):
        super().__init__(config)
        self.encoders = nn.ModuleList(AutoModel.from_config(part) for part in config.parts)
        self.post_init()


AutoConfig.register("tlv_mixture", MixtureConfig)
AutoModel.register(MixtureConfig, MixtureEncoder)


def load_mixture(first, second) -> MixtureEncoder:
    """Two loaded encoders as one. Raises ModelFolderError where their patches differ in number."""
    config = MixtureConfig(first_config=first.config, second_config=second.config)
    check_mixture(config)
    with torch.device("meta"):
        mixture = MixtureEncoder(config)
    mixture.encoders = nn.ModuleList([first, second])
    return mixture


def check_mixture(config: MixtureConfig) -> None:
    """Refuse two encoders whose features cannot stand side by side."""
    size, counts = config.picture_size, []
    for part in config.parts:
        with torch.device("meta"):
            pixels = torch.zeros(1, part.num_channels, size, size)
            try:
                counts.append(encode_frames(AutoModel.from_config(part), pixels).shape[1])
            except (ValueError, RuntimeError) as error:  # its positions are for another size
                raise ModelFolderError(
                    f"second_vision_dir: made for pictures of {part.image_size} pixels, but those "
                    f"of vision_dir have {size}; take an encoder of that size, or DINOv2"
                ) from error
    if counts[0] != counts[1]:
        patches = config.first_config.patch_size, config.second_config.patch_size
        raise ModelFolderError(
            f"second_vision_dir: at {size} pixels the two encoders give {counts[0]} and "
            f"{counts[1]} features a frame (patches of {patches[0]} and {patches[1]} pixels); a "
            "mixture needs the same patch size, and a class token in both or in neither"
        )


# ---- frames -> features ---------------------------------------------------------------------


def encode_frames(encoder, pixels, feature_layer: int = -2, drop_first_patch: bool = False):
    """pixels (T, C, H, W) -> features (T, N, D_v), in the encoder's dtype.

    Layers beyond `feature_layer` are not run. `drop_first_patch` leaves out position 0: CLIP's
    and DINOv2's class token, or, as TinyLLaVA-Video does with SigLIP (which has none), the top
    left patch: 728 of 729 stay.
    """
    if isinstance(encoder, MixtureEncoder):
        return torch.cat(
            [encode_frames(e, pixels, feature_layer, drop_first_patch) for e in encoder.encoders],
            dim=-1,
        )  # (T, N, D_1 + D_2)
    with _first_layers(encoder, feature_layer) as seen:
        encoder(pixels.to(encoder.dtype))
    return seen[0][:, 1:] if drop_first_patch else seen[0]


@contextmanager
def _first_layers(encoder, feature_layer: int):
    """The encoder cut after the layer whose output is wanted; yields the list it will be put in.

    hidden_states[k] is the output of layer k - 1; [0] is what the first layer is given.
    """
    stack, name, layers = _find_layers(encoder)
    count, seen = count_seen_layers(len(layers), feature_layer), []
    hook = stack.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    setattr(stack, name, layers[:count])
    try:
        yield seen
    finally:
        setattr(stack, name, layers)
        hook.remove()


def count_seen_layers(num_layers: int, feature_layer: int) -> int:
    """How many of an encoder's layers run before hidden_states[feature_layer] is there."""
    count = feature_layer + num_layers + 1 if feature_layer < 0 else feature_layer
    if not 0 <= count <= num_layers:
        raise ValueError(f"feature_layer = {feature_layer}: the encoder has {num_layers} layers, "
                         f"so it must lie in [{-num_layers - 1}, {num_layers}]")
    return count


def _find_layers(encoder):
    """The module that runs an encoder's layers one after the other, and the list of them."""
    for stack in encoder.modules():
        for name, child in stack.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == encoder.config.num_hidden_layers:
                return stack, name, child
    raise ModelFolderError(f"vision_dir: a {encoder.config.model_type!r} model has no list of "
                           "layers to read features from; CLIP, SigLIP and DINOv2 have one")


def trace_encoder(config, feature_layer: int = -2, drop_first_patch: bool = False):
    """What an encoder of this config would give, computed without numbers (on the meta device).

    Returns features (1, N, D_v) of one frame and the encoder.
    """
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
        size = picture_size(config)
        pixels = torch.zeros(1, config.num_channels, size, size)
        return encode_frames(encoder, pixels, feature_layer, drop_first_patch), encoder


def count_patches(config, drop_first_patch: bool = False) -> int:
    """Features per frame (N) that reach the connector."""
    key = config.to_json_string(), drop_first_patch
    if key not in _COUNTED:  # tracing a large encoder takes a fifth of a second
        _COUNTED[key] = trace_encoder(config, drop_first_patch=drop_first_patch)[0].shape[1]
    return _COUNTED[key]


_COUNTED: dict[tuple[str, bool], int] = {}


@torch.enable_grad()
def count_unseen(config, feature_layer: int = -2) -> int:
    """Parameters that the features do not depend on: no gradient reaches them."""
    features, encoder = trace_encoder(config, feature_layer)
    features.sum().backward()
    return sum(p.numel() for p in encoder.parameters() if p.grad is None)
