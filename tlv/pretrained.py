"""Load Hugging Face folders from disk: safetensors only, nothing missing, one clear error.

The toy backbones and `google/siglip-so400m-patch14-384` or `Qwen/Qwen2.5-3B` are loaded alike.
Taught in notebook 02.
"""

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig

import tlv.openelm  # noqa: F401  the Auto classes know it from here on


class ModelFolderError(ValueError):
    """A folder that is not the model it should be: names it, what is wrong, what would be right."""


def read_config(path, what: str):
    """The config of a model folder. `what` says in errors which one, such as "vision_dir"."""
    path = Path(path)
    if not path.is_dir():
        raise ModelFolderError(f"{what} = {path}: no such folder; a Hugging Face model folder "
                               "(config.json and *.safetensors) is wanted")
    if not (path / "config.json").is_file():
        raise ModelFolderError(f"{what} = {path}: no config.json in it; it is no model folder")
    try:
        kind = json.loads((path / "config.json").read_text()).get("model_type")
        with quiet():
            config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # unknown types, wrong fields and broken JSON all mean this
        raise ModelFolderError(f"{what} = {path}: config.json is not readable: "
                               f"{_first_line(error)}") from error
    if kind != config.model_type:
        raise ModelFolderError(f"{what} = {path}: model_type {kind!r} in config.json is unknown")
    return config


def load_pretrained(auto_class, path, what: str, dtype=torch.float32, **kwargs):
    """`auto_class.from_pretrained` for a folder. Weights the model wants must all be there."""
    read_config(path, what)
    if not list(Path(path).glob("*.safetensors")):
        raise ModelFolderError(f"{what} = {path}: no *.safetensors in it; the weights are missing")
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                path, dtype=dtype, local_files_only=True, use_safetensors=True,
                output_loading_info=True, **kwargs,
            )  # fmt: skip
    except Exception as error:  # a torn file, a shape that differs, a type without such a model
        raise ModelFolderError(f"{what} = {path}: its weights do not load: "
                               f"{_first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelFolderError(f"{what} = {path}: {len(missing)} weights are missing, such as "
                               f"{missing[0]}; another model's folder, or an unfinished copy")
    return model


def load_part(auto_class, path, what, **kwargs):
    """A tokenizer or a processor of a folder. Raises ModelFolderError."""
    try:
        return auto_class.from_pretrained(path, local_files_only=True, **kwargs)
    except Exception as error:
        raise ModelFolderError(f"{what} = {path}: {auto_class.__name__} finds nothing to load: "
                               f"{_first_line(error)}") from error


@contextmanager
def quiet():
    """Load without a table of what is left over (of a SigLIP folder its text tower, on purpose)."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
