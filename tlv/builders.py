"""Make a model and its processor: of pretrained parts, of another model, or from a saved folder.

Taught in notebooks 02 (parts) and 06 (another connector).
"""

from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from tlv.chat import prepare_tokenizer, stop_token_ids, video_token_id
from tlv.model import TlvConfig, TlvForConditionalGeneration, new_connector
from tlv.pretrained import ModelFolderError, load_part, load_pretrained, read_config
from tlv.processor import SELECTOR, TlvProcessor, picture_side
from tlv.selector import load_selector
from tlv.templates import resolve_template, to_jinja
from tlv.vilamp import Vilamp
from tlv.vision import count_patches, load_mixture, load_vision_encoder


def build_model(vision_dir, llm_dir, *, second_vision_dir=None, selector_dir=None,
                dtype=torch.float32, seed=0, **fields):
    """A model of two pretrained folders and a fresh connector, and its processor.

    With `second_vision_dir` the encoder is a mixture of two (CLIP and DINOv2, say), and pixels are
    the first one's. `selector_dir` is the image-text pair that the connector vilamp needs. `fields`
    are fields of TlvConfig; template = "own" reads the chat template of the LLM's tokenizer. The
    same seed gives the same connector.
    Raises ModelFolderError for a wrong folder, ValueError for a wrong field.
    """
    check_fields(fields)
    text_config = read_config(llm_dir, "llm_dir")
    tokenizer = load_part(AutoTokenizer, llm_dir, "llm_dir")
    what, template = f"llm_dir = {llm_dir}", fields.pop("template", TlvConfig.template)
    template = resolve_template(template, tokenizer, what)
    prepare_tokenizer(tokenizer, template, what)
    encoder = load_vision_encoder(vision_dir, dtype)
    image_processor = load_part(AutoImageProcessor, vision_dir, "vision_dir", backend="pil")
    _fit_side(picture_side(image_processor), encoder.config, vision_dir)
    if second_vision_dir is not None:
        second = load_vision_encoder(second_vision_dir, dtype, "second_vision_dir")
        encoder = load_mixture(encoder, second)
    for part in (encoder.config, *getattr(encoder.config, "parts", ()), text_config):
        part._name_or_path = ""  # else config.json keeps a path of the machine that built it
    config = TlvConfig(vision_config=encoder.config, text_config=text_config,
                       video_token_id=video_token_id(tokenizer), template=template, **fields)
    llm = load_pretrained(AutoModelForCausalLM, llm_dir, "llm_dir", dtype)
    selector = None if selector_dir is None else load_selector(selector_dir)
    return _assemble(config, encoder, llm, image_processor, tokenizer, selector, dtype, seed)


def check_fields(fields) -> None:
    """Raise ValueError for a name that is none of TlvConfig's."""
    unknown = sorted(set(fields) - set(TlvConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"TlvConfig has no field {', '.join(unknown)}")


def _fit_side(side: int, config, vision_dir) -> None:
    """Let DINOv2 be shown the pictures that its processor makes; refuse others that do not fit."""
    wanted = config.image_size
    if config.model_type == "dinov2" and side >= config.patch_size:
        config.picture_size = side
    elif side != wanted:
        raise ModelFolderError(
            f"vision_dir = {vision_dir}: its pictures have {side} pixels (size or crop_size in "
            f"preprocessor_config.json), but its encoder is made for {wanted} (image_size in "
            "config.json), so their patches would not fit; make both the same")


def with_connector(model, processor, *, selector_dir=None, seed=0, **fields):
    """A model with another connector, fresh, in place of its own, and its processor.

    Encoder and LLM are those of `model`, which must not be used any more. `fields` are fields of
    TlvConfig. Notebook 06.
    """
    check_fields(fields)
    config = TlvConfig.from_dict({**model.config.to_dict(), **fields})
    selector = None if selector_dir is None else load_selector(selector_dir)
    return _assemble(config, model.vision_encoder, model.language_model, processor.image_processor,
                     processor.tokenizer, selector, model.dtype, seed)


def _assemble(config, encoder, llm, image_processor, tokenizer, selector, dtype, seed):
    """Parts that are loaded, and a fresh connector -> (model, processor)."""
    if selector is not None:
        config.query_width = selector.width
    with torch.device("meta"):
        model = TlvForConditionalGeneration(config)
    model.vision_encoder, model.language_model = encoder, llm
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
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
