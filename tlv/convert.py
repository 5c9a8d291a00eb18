"""Published checkpoints -> our Hugging Face folder: `python -m tlv.convert SOURCE OUT`

Reads TinyLLaVA-Video's and TinyLLaVA Factory's flat folders, the three folders of a pretraining
run, LoRA output, and TinyLLaVABench's layout. Every weight is accounted for: what the output never
sees may be missing, all else that is missing, left over or of another shape is an error. Nothing
is unpickled, downloaded or run from the folder. Taught in notebook 02.
"""

import argparse
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tlv.builders import build_processor, check_fields, make_generation_config
from tlv.model import TlvConfig, TlvForConditionalGeneration
from tlv.pretrained import ModelFolderError, load_part, quiet, read_json
from tlv.published import collect, find_layout, rename
from tlv.published_config import translate_config
from tlv.vision import count_seen_layers, picture_size

LOG = logging.getLogger(__name__)


# ---- weights --------------------------------------------------------------------------------


def unseen_names(config: TlvConfig) -> re.Pattern:
    """Names that may be missing, since the output never sees them: of the vision encoder the
    layers beyond the one that is read, the final norm, the pooling head, the mask token."""
    parts = getattr(config.vision_config, "parts", (config.vision_config,))
    patterns = []
    for number, part in enumerate(parts):
        count = part.num_hidden_layers
        first = count_seen_layers(count, config.vision_feature_layer)
        rest = "|".join(str(i) for i in range(first, count)) or "none"
        prefix = rf"vision_encoder\.(encoders\.{number}\.)?"
        patterns.append(rf"{prefix}(encoder\.layers?\.({rest})\.|post_layernorm\.|layernorm\.|head\."
                        r"|embeddings\.mask_token$)")  # fmt: skip
    return re.compile("|".join(patterns))


def match(config: TlvConfig, found: dict[str, torch.Tensor], source) -> dict[str, torch.Tensor]:
    """The weights of our model, every one accounted for. Raises ModelFolderError."""
    with torch.device("meta"):
        model = TlvForConditionalGeneration(config)
    wanted = model.state_dict()
    weights = {rename(k): v for k, v in found.items()}
    if len(weights) < len(found):
        counts = Counter(map(rename, found))
        twice = [name for name in found if counts[rename(name)] > 1]
        raise ModelFolderError(f"{source}: {' and '.join(twice[:2])} are one weight of ours; "
                               "files of two models lie in it")
    head = "language_model.lm_head.weight"
    embeddings = next(name for name, parameter in model.named_parameters()
                      if parameter is model.get_input_embeddings().weight)
    if config.tie_word_embeddings:
        if head in weights and embeddings not in weights:  # either may stand for both
            weights[embeddings] = weights[head]
        if head in weights and not torch.equal(weights[head], weights[embeddings]):
            raise ModelFolderError(f"{source}: its config ties the LLM's head to its embeddings, "
                                   "but they differ")
        weights.pop(head, None)
        wanted.pop(head, None)
    unseen = unseen_names(config)
    missing = [k for k in wanted if k not in weights and not unseen.match(k)]
    extra = [k for k in weights if k not in wanted]
    other = [f"{k} is {tuple(weights[k].shape)} and not {tuple(wanted[k].shape)}"
             for k in wanted if k in weights and weights[k].shape != wanted[k].shape]
    for what, names in (("missing", missing), ("unknown", extra), ("of another shape", other)):
        if names:
            raise ModelFolderError(f"{source}: {len(names)} weights are {what}: "
                                   f"{', '.join(names[:4])}{' ...' * (len(names) > 4)}")
    zeros = [k for k in wanted if k not in weights]
    if zeros:
        LOG.info(f"{len(zeros)} weights that the output never sees are not there, and become zeros")
    dtype = weights[embeddings].dtype
    return {k: weights.get(k, torch.zeros(v.shape, dtype=dtype)) for k, v in wanted.items()}


# ---- the whole ------------------------------------------------------------------------------


def make_image_processor(source, vision_config):
    """The pixels that a published encoder was trained with, which a checkpoint does not hold."""
    vision = getattr(vision_config, "first_config", vision_config)
    side = picture_size(vision)
    square = {"height": side, "width": side}
    if vision.model_type == "siglip_vision_model":
        return SiglipImageProcessorPil(size=square)
    processor = {"clip_vision_model": CLIPImageProcessorPil, "dinov2": BitImageProcessorPil}
    if vision.model_type not in processor:
        raise ModelFolderError(f"{source}: no image processor is known for a {vision.model_type!r} "
                               f"encoder; known are siglip_vision_model, {', '.join(processor)}")
    shortest, means = side, {}
    if vision.model_type == "dinov2":
        shortest = side * 8 // 7  # 256 for 224
        means = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    return processor[vision.model_type](size={"shortest_edge": shortest}, crop_size=square, **means)


def convert(source, out, *, vision_dir=None, second_vision_dir=None, tokenizer_dir=None,
            template=None, **fields) -> TlvConfig:
    """Write the published checkpoint `source` as the folder `out`, which `load_model` reads.

    Frames, template, feature layer and patch flag are carried over or follow from the checkpoint;
    `fields` of TlvConfig overrule them. Returns the config. Raises ModelFolderError, ValueError
    for a wrong field. Nothing is replaced: `out` must be new, or an empty folder.
    """
    source, out = Path(source), Path(out).resolve()
    check_fields(fields)
    _check_place(source, out)
    layout = find_layout(source)
    raw = read_json(source / "config.json", "source")
    try:
        with quiet():  # a published model type is news to transformers
            what = "source" if tokenizer_dir is None else "tokenizer_dir"
            tokenizer = load_part(AutoTokenizer, tokenizer_dir or source, what)
    except ModelFolderError as error:
        raise ModelFolderError(f"{error}; give the language model's folder as tokenizer_dir"
                               ) from error  # fmt: skip
    config = translate_config(
        source, raw, layout, tokenizer, vision_dir=vision_dir,
        second_vision_dir=second_vision_dir, template=template, **fields,
    )  # fmt: skip
    weights = match(config, collect(source, layout), source)
    with torch.device("meta"):  # its dtype is what config.json will say
        model = TlvForConditionalGeneration(config).to(next(iter(weights.values())).dtype)
    model.generation_config = make_generation_config(config, tokenizer)
    images = make_image_processor(source, config.vision_config)
    processor = build_processor(config, model.connector, images, tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        draft = Path(place) / out.name
        model.save_pretrained(draft, state_dict=weights)
        processor.save_pretrained(draft)
        os.sync()  # all of it is on the disk before it has its name
        os.replace(draft, out)
    return config


def _check_place(source: Path, out: Path) -> None:
    """Refuse an `out` where something is already."""
    if source.resolve().is_relative_to(out):
        raise ModelFolderError(f"out = {out} holds the source {source}; name a new folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ModelFolderError(f"out = {out} is there already, and nothing is replaced; name a new "
                               "folder, or delete this one")


def main(arguments=None) -> int:
    """The command: prints what was carried over; or why nothing was written, and returns 1."""
    parser = argparse.ArgumentParser(prog="python -m tlv.convert", description=__doc__)
    parser.add_argument("source", help="the published checkpoint's folder")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--vision-dir", help="the encoder's folder, where its config is not inside")
    parser.add_argument("--second-vision-dir", help="of a mixture")
    parser.add_argument("--tokenizer-dir", help="the LLM's folder, where no tokenizer is inside")
    parser.add_argument("--template", help="overrules the one that follows from the LLM")
    parser.add_argument("--num-frames", type=int, help="of a clip; 16 for video connectors, else 1")
    parser.add_argument("--sampling", choices=("uniform", "fps"),
                        help="how frames are chosen; fps for the checkpoints named 1fps")
    parser.add_argument("--fps", type=float, help="frames per second, of --sampling fps")
    parser.add_argument("--max-frames", type=int, help="of a clip at most, of --sampling fps")
    options = vars(parser.parse_args(arguments))
    options = {key: value for key, value in options.items() if value is not None}
    if options.get("sampling") == "fps" and "num_frames" in options:
        parser.error("--num-frames says nothing with --sampling fps; --fps and --max-frames do")
    if options.get("sampling") != "fps" and {"fps", "max_frames"} & set(options):
        parser.error("--fps and --max-frames say nothing without --sampling fps")
    try:
        config = convert(options.pop("source"), options.pop("out"), **options)
    except (ValueError, OSError) as error:  # of the folder, of a template that does not fit, a disk
        print(error)
        return 1
    print(json.dumps({key: getattr(config, key) for key in (
        "connector_type", "template", "num_frames", "sampling", "fps", "max_frames",
        "vision_feature_layer", "drop_first_patch", "image_mode", "max_seq_len",
    )}, indent=1))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
