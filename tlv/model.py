"""The model in Hugging Face form: vision encoder, connector, and a language model kept whole.

Clips become video tokens in the connector's output; they replace the embeddings of the
placeholders in `input_ids`, and the language model does the rest. Source: TinyLLaVA-Video section 1
(arXiv 2501.15513). Taught in notebook 02.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

import tlv.openelm  # noqa: F401  the Auto classes know it from here on
from tlv.checks import check_shape
from tlv.connectors import build_connector
from tlv.processor import TlvProcessor
from tlv.resamplers import LATENTS
from tlv.templates import get_template
from tlv.vilamp import Vilamp
from tlv.vision import count_patches, encode_frames

CLIPS = ("pixel_values_videos", "video_features", "keyframes", "queries")
VISUALS = (*CLIPS, "video_index")


@strict
class TlvConfig(PreTrainedConfig):
    """Everything that decides the model's shape and how clips and conversations enter it."""

    model_type = "tlv"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }
    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    connector_type: str = "group_resampler"
    num_queries: int = 512  # video tokens of a resampler
    num_groups: int = 16
    num_resampler_layers: int = 3
    resampler_heads: int = 8
    resampler_head_dim: int = 64
    connector_width: int = 768  # of the narrow ones, bench_resampler and qformer
    position_dtype: str = "float16"  # rounding of the resampler's positions
    num_keyframes: int = 32  # of vilamp: K at most
    keyframe_grid: int = 0  # side of the grid that a keyframe's patches are pooled to; 0: not
    selection: str = "dks"  # how keyframes are chosen: "dks", "top_k" or "uniform"
    keyframe_threshold: float = 0.85  # cosine above which two frames are the same to DKS
    merging: str = "learned"  # how other frames become tokens: or "paper", "mean", "drop"
    merging_width: int = 256
    query_width: int = 0  # of the selector's embeddings
    vision_feature_layer: int = -2
    drop_first_patch: bool = False
    video_token_id: int = 0  # may lie outside the vocabulary
    template: str | dict = "qwen2_base"  # or the fields of a tlv.templates.Template
    num_frames: int = 16
    sampling: str = "uniform"  # or "fps": fps frames per second, at most max_frames
    fps: float = 1.0
    max_frames: int = 64
    image_mode: str = "square"  # how a frame becomes a square: "square", "pad" or "crop"
    max_seq_len: int = 3072  # tokens of a training row, video tokens included
    long_rows: str = "skip"  # a row beyond it is left out; or "cut" at its end, as published
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        self.initializer_range = getattr(self.text_config, "initializer_range", 0.02)
        get_template(self.template)
        for name in ("num_frames", "max_frames", "fps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)!r} must be more than 0")
        if self.long_rows not in ("skip", "cut"):
            raise ValueError(f"long_rows = {self.long_rows!r} must be 'skip' or 'cut'")
        if self.connector_type == "vilamp" and self.sampling != "fps":
            raise ValueError(f"connector_type 'vilamp' with sampling = {self.sampling!r}: it reads "
                             "clips of any length; take 'fps', with fps and max_frames (the cap)")


class TlvPreTrainedModel(PreTrainedModel):
    """What transformers has to know about the class."""

    config: TlvConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("video", "image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["PerceiverAttention"]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module):
        """Matrices N(0, initializer_range), biases 0, norms 1 and 0, latents as published."""
        super()._init_weights(module)
        if isinstance(module, LATENTS):
            init.normal_(module.latents, mean=0.0, std=module.latent_std)


class TlvForConditionalGeneration(TlvPreTrainedModel, GenerationMixin):
    """Videos, pictures (clips of one frame) and text in, text out."""

    def __init__(self, config: TlvConfig):
        super().__init__(config)
        vision = config.vision_config
        self.frame_shape = count_patches(vision, config.drop_first_patch), vision.hidden_size
        self.vision_encoder = AutoModel.from_config(vision)
        self.connector = new_connector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    # ---- clips -> video tokens --------------------------------------------------------------

    def vision_features(self, pixels):
        """Frames (T, C, H, W) -> what the connector reads, (T, N, D_v)."""
        config = self.config
        return encode_frames(self.vision_encoder, pixels, config.vision_feature_layer,
                             config.drop_first_patch)

    def encode_videos(self, pixel_values_videos=None, video_features=None, keyframes=None,
                      queries=None) -> list[torch.Tensor]:
        """Clips -> their video tokens, a list of (Q, D); Q may differ where T does.

        pixel_values_videos: (B, T, C, H, W) or a list of (T, C, H, W); or video_features, what the
        encoder made of them before: (B, T, N, D_v) or a list of (T, N, D_v). With the connector
        vilamp also keyframes, a list of (K,), and queries (B, D_q), from the selector. The encoder
        and the connector are each called once, so that parallel ranks keep step.
        """
        if video_features is None:
            lengths = [len(clip) for clip in pixel_values_videos]
            frames = torch.cat(list(pixel_values_videos))  # (sum of T, C, H, W)
            video_features = self.vision_features(frames).split(lengths)
        for clip in video_features:  # the connector was built for such frames
            check_shape(clip, (None, *self.frame_shape), "video_features")  # (T, N, D_v)
        # A connector without parameters (identity) takes features as they are.
        dtype, device = next(self.connector.parameters(), video_features[0]).dtype, self.device
        clips = [clip.to(device, dtype) for clip in video_features]  # (T, N, D_v)
        if isinstance(self.connector, Vilamp):
            return self.connector(clips, keyframes, queries.to(device))
        clips = [clip.flatten(0, 1) for clip in clips]  # (S, D_v)
        lengths = [len(clip) for clip in clips]
        tokens = self.connector(pad_sequence(clips, batch_first=True), lengths)  # (B, Q, D)
        counts = [self.connector.num_tokens(length) for length in lengths]
        return [clip[:count] for clip, count in zip(tokens, counts, strict=True)]

    def embed(self, input_ids, video_index=None, **clips_in):
        """Token ids (B, L) and clips -> embeddings (B, L, D), placeholders replaced.

        Clips as in `encode_videos`. The k-th row that holds placeholders shows clip video_index[k]
        (default: k), so that several questions can share a clip. ValueError if placeholders and
        video tokens differ.
        """
        is_video = input_ids == self.config.video_token_id  # (B, L)
        # The placeholder's own id is never looked up: it may not be in the vocabulary.
        words = self.get_input_embeddings()
        embeds = words(input_ids.masked_fill(is_video, 0))
        counts = [count for count in is_video.sum(1).tolist() if count]
        clips = []
        if {"pixel_values_videos", "video_features"} & clips_in.keys():
            clips = self.encode_videos(**clips_in)
        index = range(len(clips)) if video_index is None else video_index.tolist()
        if len(index) != len(counts):
            raise ValueError(f"{len(counts)} rows hold placeholders, but {len(index)} clips are "
                             f"given for them ({len(clips)} clips in all)")
        if index and not 0 <= min(index) <= max(index) < len(clips):
            raise ValueError(f"video_index {list(index)} names clips beyond the {len(clips)} given")
        for count, clip in zip(counts, index, strict=True):
            if count != len(clips[clip]):
                raise ValueError(f"{count} placeholders in a row, but {len(clips[clip])} video "
                                 f"tokens of its clip {clip}")
        if counts:
            tokens = torch.cat([clips[clip] for clip in index]).to(embeds.device, embeds.dtype)
            if hasattr(words, "embed_scale"):  # Gemma; published code scales all that it embeds
                tokens = tokens * words.embed_scale.to(tokens.dtype)
            embeds = embeds.masked_scatter(is_video[..., None], tokens)
        return embeds + self._touch(clips, index) if self.training else embeds

    def _touch(self, clips, index):
        """Zero, but made of what no row shows: no parameter of the connector lacks a gradient.

        A rank whose batch is text alone must not leave the others waiting for its gradients. The
        encoder is not run for that: where it is trained, such a batch leaves it without one.
        """
        unused = [clip for k, clip in enumerate(clips) if k not in index]
        if not clips:
            queries = torch.zeros(1, self.config.query_width)
            unused = self.encode_videos(video_features=[torch.zeros(1, *self.frame_shape)],
                                        keyframes=[torch.tensor([0])], queries=queries)
        return sum((0.0 * clip.sum() for clip in unused), start=0.0)

    # ---- the language model -----------------------------------------------------------------

    def forward(self, input_ids=None, attention_mask=None, position_ids=None,
                pixel_values_videos=None, video_features=None, keyframes=None, queries=None,
                video_index=None, past_key_values=None, inputs_embeds=None, labels=None,
                use_cache=None, logits_to_keep=0, **kwargs):
        """The language model's own output (loss if labels, logits (B, L, V), cache).

        Clips as in `encode_videos`, rows and clips as in `embed`.
        """
        if inputs_embeds is None:
            given = (pixel_values_videos, video_features, keyframes, queries)
            clips = {name: x for name, x in zip(CLIPS, given, strict=True) if x is not None}
            inputs_embeds = self.embed(input_ids, video_index, **clips)
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, labels=labels, use_cache=use_cache,
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        """Clips enter with the prompt; afterwards they are in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs = {key: value for key, value in inputs.items() if key not in VISUALS}
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, input_ids=None, **kwargs):
        """Several answers per prompt: rows are repeated, clips stay, the rows' index follows."""
        clips = {key: kwargs.pop(key) for key in VISUALS if key in kwargs}
        if clips and expand_size > 1:
            index = clips.get("video_index")
            if index is None:
                has_video = (input_ids == self.config.video_token_id).any(1)
                index = torch.arange(int(has_video.sum()))
            clips["video_index"] = index.repeat_interleave(expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **clips}


def new_connector(config: TlvConfig) -> nn.Module:
    """The connector that a config asks for, weights as torch makes them."""
    vision = config.vision_config
    return build_connector(
        config.connector_type, vision_width=vision.hidden_size,
        llm_width=config.text_config.hidden_size, num_queries=config.num_queries,
        num_groups=config.num_groups, num_layers=config.num_resampler_layers,
        num_heads=config.resampler_heads, head_dim=config.resampler_head_dim,
        width=config.connector_width, position_dtype=config.position_dtype,
        num_keyframes=config.num_keyframes, keyframe_grid=config.keyframe_grid,
        query_width=config.query_width, merging=config.merging, merging_width=config.merging_width,
        patches_per_frame=count_patches(vision, config.drop_first_patch),
        vision_widths=getattr(vision, "widths", ()),
    )  # fmt: skip


AutoConfig.register("tlv", TlvConfig)
AutoModel.register(TlvConfig, TlvForConditionalGeneration)
AutoModelForImageTextToText.register(TlvConfig, TlvForConditionalGeneration)
AutoProcessor.register(TlvConfig, TlvProcessor)
