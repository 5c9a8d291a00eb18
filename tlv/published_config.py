"""A published checkpoint's config.json as ours: encoder, language model, connector, template.

Layouts are those of `tlv.published`. Taught in notebook 02.
"""

from pathlib import Path

from transformers import AutoConfig

from tlv.chat import prepare_tokenizer, video_token_id
from tlv.designs import ENCODERS
from tlv.model import TlvConfig
from tlv.pretrained import ModelFolderError, forget_code, read_config
from tlv.published import LEGACY_LLMS
from tlv.templates import OWN, TEMPLATES, resolve_template
from tlv.vision import check_mixture, vision_part

CONNECTOR_NAMES = {  # published: ours, and whether it is made for videos
    "groupresampler": ("group_resampler", True),
    "naiveresampler": ("naive_resampler", True),
    "resamplerwithpe": ("naive_resampler", True),  # its name before March 2025
    "resampler": ("resampler", False),
    "identity": ("identity", False),
    "linear": ("linear", False),
    "mof_mlp": ("mof_mlp", False),
    **{f"mlp{n}x_gelu": (f"mlp{n}x_gelu", False) for n in range(1, 10)},
}
TEMPLATES_OF = {  # of a language model: the first whose stop is the tokenizer's end token
    "qwen2": ("qwen2_base", "qwen2_instruct"),
    "phi": ("phi",),
    "stablelm": ("phi",),
    "gemma": ("gemma",),
    "llama": ("llama",),
    "openelm": ("llama",),
}
LEGACY_ENCODERS = {
    **{name: name for name in ENCODERS},
    "bczhou/TinyLLaVA-1.5B-SigLIP": "google/siglip-so400m-patch14-384",
    "bczhou/TinyLLaVA-2.0B-SigLIP": "google/siglip-so400m-patch14-384",
    "bczhou/TinyLLaVA-3.1B-SigLIP": "google/siglip-so400m-patch14-384",
}
OLD_STABLELM = {  # names of StableLM-2's own code, from before transformers knew it: today's
    "rope_pct": "partial_rotary_factor",
    "norm_eps": "layer_norm_eps",
    "num_heads": "num_attention_heads",
}
SELECTIONS = {"patch": True, "cls_patch": False}  # published: is the first patch dropped?


def read_vision_config(source: Path, raw: dict, layout: str, vision_dir=None, second_dir=None):
    """The encoder's config: that of the checkpoint, of the folders given, or by published name."""
    if vision_dir is not None:
        config = _without_path(vision_part(read_config(vision_dir, "vision_dir")))
    elif layout == "legacy":
        name = raw.get("mm_vision_tower")
        if name not in LEGACY_ENCODERS:
            raise ModelFolderError(f"{source}: mm_vision_tower {name!r} is unknown; give the "
                                   "encoder's folder as vision_dir (its config.json is read)")
        config = AutoConfig.for_model(**ENCODERS[LEGACY_ENCODERS[name]])
    else:
        names = ("model_name_or_path", "model_name_or_path2")
        fields = {k: v for k, v in (raw.get("vision_config") or {}).items() if k not in names}
        config = _make_config(source, "vision_config", fields)
    if raw.get("vision_model_name_or_path2") and second_dir is None:
        raise ModelFolderError(f"{source}: its encoder is a mixture with "
                               f"{raw['vision_model_name_or_path2']!r}, whose config it does not "
                               "hold; give that folder as second_vision_dir")
    if second_dir is not None:
        second = _without_path(vision_part(read_config(second_dir, "second_vision_dir")))
        config = AutoConfig.for_model("tlv_mixture", first_config=config, second_config=second)
        check_mixture(config)
    elif config.model_type == "dinov2" and config.image_size == 518:
        config.picture_size = 224  # what its image processor makes; its config does not say
    return config


def _without_path(config):
    """Else config.json keeps a path of the machine that made it."""
    config._name_or_path = ""
    return config


def _make_config(source, what: str, fields: dict):
    try:
        return forget_code(AutoConfig.for_model(**fields))
    except Exception as error:
        raise ModelFolderError(f"{source}: {what} is not usable (model_type "
                               f"{fields.get('model_type')!r}): {str(error)[:200]}") from error


def read_text_config(source: Path, raw: dict, layout: str):
    """The language model's config, which legacy folders spread over their own."""
    fields = dict(raw if layout == "legacy" else raw.get("text_config") or {})
    if layout == "legacy":
        fields["model_type"] = LEGACY_LLMS[raw["architectures"][0]]
    if fields.get("model_type") == "stablelm":  # a field that is unknown would be left unread
        today = {new: fields.pop(old) for old, new in OLD_STABLELM.items() if old in fields}
        fields = today | fields
    unwanted = ("architectures", "_name_or_path", "torch_dtype", "quantization_config")
    wanted = {k: v for k, v in fields.items() if k not in unwanted and not k.startswith("mm_")}
    return _make_config(source, "text_config", wanted)


def translate_config(source, raw, layout, tokenizer, *, vision_dir=None, second_vision_dir=None,
                     template=None, **fields) -> TlvConfig:
    """A published config.json as ours. `fields` of TlvConfig, such as num_frames, win."""
    vision = read_vision_config(source, raw, layout, vision_dir, second_vision_dir)
    text, prefix = read_text_config(source, raw, layout), "mm_" if layout == "legacy" else ""
    published = raw.get("mm_projector_type" if layout == "legacy" else "connector_type")
    known = dict(CONNECTOR_NAMES)
    if layout == "legacy":  # its resampler is bench_resampler here; no weights were released
        known = {name: ours for name, ours in known.items() if "resampler" not in name}
    if published not in known:
        raise ModelFolderError(f"{source}: connector {published!r} is unknown; known are "
                               f"{', '.join(known)}")
    connector, is_video = CONNECTOR_NAMES[published]
    layer, select = (
        ("mm_vision_select_layer", "mm_vision_select_feature") if prefix
        else ("vision_feature_layer", "vision_feature_select_strategy")
    )  # fmt: skip
    is_siglip = vision.model_type == "siglip_vision_model"
    if raw.get(select, "patch") not in SELECTIONS:
        raise ModelFolderError(f"{source}: {select} {raw[select]!r} is unknown; known are "
                               f"{', '.join(SELECTIONS)}")
    drops = SELECTIONS[raw.get(select, "patch")] and not (layout == "legacy" and is_siglip)
    modes = {"square": "square" if is_siglip else "crop", "pad": "pad"}
    shape = raw.get("image_aspect_ratio", "square")
    if shape not in modes:
        raise ModelFolderError(f"{source}: image_aspect_ratio {shape!r} is not supported; "
                               f"published models use {', '.join(modes)}")
    template = template or find_template(source, text, tokenizer)
    template = resolve_template(template, tokenizer, str(source))
    carried = dict(
        connector_type=connector, num_queries=raw.get("num_queries") or 128,
        num_groups=raw.get("group") or 1,
        num_resampler_layers=raw.get("num_resampler_layers") or 3,
        vision_feature_layer=raw.get(layer, -2), drop_first_patch=drops, image_mode=modes[shape],
        max_seq_len=raw.get("tokenizer_model_max_length") or 2048, long_rows="cut",
        num_frames=16 if is_video else 1, template=template,
    )  # fmt: skip
    tokenizer = prepare_tokenizer(tokenizer, carried["template"], str(source))
    try:
        return TlvConfig(vision_config=vision, text_config=text,
                         video_token_id=video_token_id(tokenizer), **(carried | fields))
    except Exception as error:  # a value of another type, named by our field
        if any(str(error).startswith(name) for name in fields):
            raise  # it is the caller's
        raise ModelFolderError(f"{source}: its config.json makes no model: {str(error)[:300]}"
                               ) from error  # fmt: skip


def find_template(source, text_config, tokenizer) -> str:
    """The template that a language model was trained with: its family's, by its end token."""
    names = TEMPLATES_OF.get(text_config.model_type, ())
    fitting = [name for name in names if TEMPLATES[name].stop == tokenizer.eos_token]
    if not fitting:
        raise ModelFolderError(f"{source}: no template is known for a {text_config.model_type!r} "
                               f"model whose end token is {tokenizer.eos_token!r}; name one of "
                               f"{', '.join(TEMPLATES)} as template, or {OWN}: the tokenizer's")
    return fitting[0]
