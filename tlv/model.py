"""The model in Hugging Face form: vision encoder, connector, and a language model kept whole.

Clips become video tokens in the connector's output; they replace the embeddings of the
placeholders in `input_ids`, and the language model does the rest. Source: TinyLLaVA-Video section 1
(arXiv 2501.15513). Taught in notebook 02.
"""

from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from tlv.chat import get_template, prepare_tokenizer, stop_token_ids, to_jinja, video_token_id
from tlv.connectors import build_connector
from tlv.pretrained import ModelFolderError, load_part, load_pretrained, read_config
from tlv.processor import SELECTOR, TlvProcessor
from tlv.resamplers import LATENTS
from tlv.selector import load_selector
from tlv.vilamp import Vilamp
from tlv.vision import (
    count_patches,
    encode_frames,
    load_mixture,
    load_vision_encoder,
)

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
    template: str = "qwen2_base"
    num_frames: int = 16
    sampling: str = "uniform"  # or "fps": fps frames per second, at most max_frames
    fps: float = 1.0
    max_frames: int = 64
    image_mode: str = "square"  # how a frame becomes a square: "square", "pad" or "crop"
    max_seq_len: int = 3072  # tokens of a training row, video tokens included
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        self.initializer_range = getattr(self.text_config, "initializer_range", 0.02)
        get_template(self.template)
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
        """Matrices N(0, initializer_range), biases 0, norms 1 and 0, latents N(0, 1)."""
        super()._init_weights(module)
        if isinstance(module, LATENTS):
            init.normal_(module.latents, mean=0.0, std=1.0)


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
        dtype, device = next(self.connector.parameters()).dtype, self.device
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
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_video, 0))
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
            embeds = embeds.masked_scatter(is_video[..., None], tokens)
        return embeds + self._touch(clips, index) if self.training else embeds

    def _touch(self, clips, index):
        """Zero, but made of what no row shows: no trained parameter is without a gradient.

        A rank whose batch is text alone must not leave the others waiting for its gradients.
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


# ---- builders -------------------------------------------------------------------------------


def build_model(vision_dir, llm_dir, *, second_vision_dir=None, selector_dir=None,
                dtype=torch.float32, seed=0, **fields):
    """A model of two pretrained folders and a fresh connector, and its processor.

    With `second_vision_dir` the encoder is a mixture of two (CLIP and DINOv2, say), and pixels are
    the first one's. `selector_dir` is the image-text pair that the connector vilamp needs. `fields`
    are fields of TlvConfig. The same seed gives the same connector.
    Raises ModelFolderError for a wrong folder, ValueError for a wrong field.
    """
    unknown = sorted(set(fields) - set(TlvConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"TlvConfig has no field {', '.join(unknown)}")
    read_config(vision_dir, "vision_dir")
    text_config = read_config(llm_dir, "llm_dir")
    tokenizer = load_part(AutoTokenizer, llm_dir, "llm_dir")
    prepare_tokenizer(tokenizer, fields.get("template", TlvConfig.template), f"llm_dir = {llm_dir}")
    image_processor = load_part(AutoImageProcessor, vision_dir, "vision_dir", backend="pil")
    encoder = load_vision_encoder(vision_dir, dtype)
    if second_vision_dir is not None:
        second = load_vision_encoder(second_vision_dir, dtype, "second_vision_dir")
        encoder = load_mixture(encoder, second)
    for part in (encoder.config, *getattr(encoder.config, "parts", ()), text_config):
        part._name_or_path = ""  # else config.json keeps a path of the machine that built it
    config = TlvConfig(vision_config=encoder.config, text_config=text_config,
                       video_token_id=video_token_id(tokenizer), **fields)
    llm = load_pretrained(AutoModelForCausalLM, llm_dir, "llm_dir", dtype)
    selector = None if selector_dir is None else load_selector(selector_dir)
    return _assemble(config, encoder, llm, image_processor, tokenizer, selector, dtype, seed)


def with_connector(model, processor, *, max_positions=None, selector_dir=None, seed=0, **fields):
    """A model with another connector, fresh, in place of its own, and its processor.

    Encoder and LLM are those of `model`, which must not be used any more. `fields` are fields of
    TlvConfig; max_positions tells the LLM's context, where training widens it. Notebook 06.
    """
    config = TlvConfig.from_dict({**model.config.to_dict(), **fields})
    llm = model.language_model
    if max_positions is not None:
        for part in (config.text_config, llm.config):
            part.max_position_embeddings = max_positions
    selector = None if selector_dir is None else load_selector(selector_dir)
    return _assemble(config, model.vision_encoder, llm, processor.image_processor,
                     processor.tokenizer, selector, model.dtype, seed)


def _assemble(config, encoder, llm, image_processor, tokenizer, selector, dtype, seed):
    """Parts that are loaded, and a fresh connector -> (model, processor)."""
    if selector is not None:
        config.query_width = selector.width
    with torch.device("meta"):
        model = TlvForConditionalGeneration(config)
    model.vision_encoder, model.language_model = encoder, llm
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.connector = new_connector(config).apply(model._init_weights).to(dtype)
    model.config.dtype = dtype
    model.generation_config = make_generation_config(config, tokenizer)
    processor = build_processor(config, model.connector, image_processor, tokenizer)
    processor.selector = selector
    return model.eval(), processor


def make_generation_config(config, tokenizer) -> GenerationConfig:
    """Greedy, until the template's stop; a placeholder is never answered."""
    in_vocabulary = config.video_token_id < config.text_config.vocab_size
    return GenerationConfig(
        eos_token_id=stop_token_ids(config.template, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[config.video_token_id] if in_vocabulary else None,
    )  # fmt: skip


def build_processor(config, connector, image_processor, tokenizer) -> TlvProcessor:
    """The processor that goes with a model: how clips are read, and how many tokens they become."""
    if isinstance(connector, Vilamp):
        per_clip, per_frame = 0, connector.tokens_per_frame
        keys = dict(num_keyframes=connector.num_keyframes, selection=config.selection,
                    keyframe_threshold=config.keyframe_threshold,
                    tokens_per_keyframe=connector.tokens_per_keyframe)
    else:
        num_patches = count_patches(config.vision_config, config.drop_first_patch)
        one, two = connector.num_tokens(num_patches), connector.num_tokens(2 * num_patches)
        per_clip, per_frame, keys = 2 * one - two, two - one, {}
    return TlvProcessor(
        image_processor, tokenizer, chat_template=to_jinja(config.template),
        num_frames=config.num_frames, sampling=config.sampling, fps=config.fps,
        max_frames=config.max_frames, image_mode=config.image_mode,
        tokens_per_clip=per_clip, tokens_per_frame=per_frame, **keys,
    )  # fmt: skip


def load_model(model_dir, dtype=torch.float32, what: str = "model_dir"):
    """(model, processor) of a folder that `save_pretrained` wrote. Raises ModelFolderError."""
    config = read_config(model_dir, what)
    if not isinstance(config, TlvConfig):
        raise ModelFolderError(f"{what} = {model_dir}: a {config.model_type!r} model; a 'tlv' one "
                               "is wanted, as notebooks 02 to 04 write it")
    model = load_pretrained(TlvForConditionalGeneration, model_dir, what, dtype)
    processor = load_part(TlvProcessor, model_dir, what)
    if processor.num_keyframes:
        processor.selector = load_selector(Path(model_dir) / SELECTOR, what)
    return model.eval(), processor
