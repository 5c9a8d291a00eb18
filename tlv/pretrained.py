"""Load Hugging Face folders from disk: safetensors only, nothing missing, one clear error.

The toy backbones and `google/siglip-so400m-patch14-384` or `Qwen/Qwen2.5-3B` are loaded alike.
No code that lies in a folder is run, and no one is asked whether it should. Taught in notebook 02.
"""

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging as hf_logging

import tlv.openelm  # noqa: F401  the Auto classes know it from here on


class ModelFolderError(ValueError):
    """A folder that is not the model it should be: names it, what is wrong, what would be right."""


def read_config(path, what: str):
    """The config of a model folder. `what` says in errors which one, such as "vision_dir".

    What it says of code to be run (auto_map) is left out, so that nothing later asks for it.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelFolderError(f"{what} = {path}: no such folder; a Hugging Face model folder "
                               "(config.json and *.safetensors) is wanted")
    if not (path / "config.json").is_file():
        below = sorted(found.parent.name for found in path.glob("*/config.json"))
        raise ModelFolderError(f"{what} = {path}: no config.json in it; it is no model folder"
                               + (f", but its {below[0]}/ is one" if below else ""))
    raw = read_json(path / "config.json", what)
    kind = raw.get("model_type")
    if kind == "tinyllava" or "TinyLlava" in str(raw.get("architectures")):
        raise ModelFolderError(f"{what} = {path}: a published checkpoint (model_type {kind!r}); "
                               f"convert it first: python -m tlv.convert {path} OUT")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, local_files_only=True,
                                                trust_remote_code=False)  # fmt: skip
    except Exception as error:  # unknown types and wrong fields both mean this
        raise ModelFolderError(f"{what} = {path}: config.json (model_type {kind!r}) is not "
                               f"usable: {_reason(error)}") from error
    if kind != config.model_type:
        raise ModelFolderError(f"{what} = {path}: model_type {kind!r} in config.json is unknown")
    return forget_code(config)


def forget_code(config):
    """The config without its references to code of its own, and without those of its parts."""
    vars(config).pop("auto_map", None)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            forget_code(part)
    return config


def check_weights(path, what: str) -> None:
    """Refuse a folder without *.safetensors, and one whose index names a file that is not there."""
    path = Path(path)
    if not list(path.glob("*.safetensors")):
        raise ModelFolderError(f"{what} = {path}: no *.safetensors in it; the weights are missing"
                               + rewritten(path, "pytorch_model.bin", "model.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").is_file():
        read_shards(index, what)


def rewritten(folder: Path, old: str, new: str) -> str:
    """How a file of pickled weights, if it is there, becomes one that is read; else ""."""
    if not (folder / old).is_file():
        return ""
    return (f", but {old} is there, which may run code when it is read. Rewrite it: safetensors."
            f"torch.save_file({{k: v.clone() for k, v in torch.load('{old}', weights_only=True)"
            f".items()}}, '{new}')")


def read_shards(index: Path, what: str) -> list[str]:
    """The files that an index of weights names, each of which must be there."""
    shards = read_json(index, what).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(f, str) for f in shards.values()):
        raise ModelFolderError(f"{what} = {index.parent}: {index.name} has no weight_map of file "
                               "names; copy the file again")
    files = sorted(set(shards.values()))
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise ModelFolderError(f"{what} = {index.parent}: {index.name} names "
                               f"{', '.join(missing)}, which is not there; the copy is unfinished")
    return files


def load_pretrained(auto_class, path, what: str, dtype=torch.float32, **kwargs):
    """`auto_class.from_pretrained` for a folder. Weights the model wants must all be there."""
    config = read_config(path, what)
    check_weights(path, what)
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                path, dtype=dtype, local_files_only=True, use_safetensors=True,
                output_loading_info=True, trust_remote_code=False, **({"config": config} | kwargs),
            )  # fmt: skip
    except Exception as error:  # a torn file, a shape that differs, a type without such a model
        raise ModelFolderError(f"{what} = {path}: its weights do not load: "
                               f"{_reason(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelFolderError(f"{what} = {path}: {len(missing)} weights are missing, such as "
                               f"{missing[0]}; another model's folder, or an unfinished copy")
    return model


def load_part(auto_class, path, what, **kwargs):
    """A tokenizer or a processor of a folder. Raises ModelFolderError."""
    try:
        part = auto_class.from_pretrained(path, local_files_only=True, trust_remote_code=False,
                                          **kwargs)  # fmt: skip
        tokenizer = getattr(part, "tokenizer", part)
        if isinstance(tokenizer, PreTrainedTokenizerBase) and _is_empty(tokenizer):
            raise ValueError("no token but special ones; tokenizer.json, or the files that it is "
                             "made of, is missing")
    except Exception as error:
        raise ModelFolderError(f"{what} = {path}: {auto_class.__name__} finds nothing to load: "
                               f"{_reason(error)}") from error
    return part


def _is_empty(tokenizer) -> bool:
    """Is it what transformers makes of a known model's folder without a tokenizer's files?"""
    return set(tokenizer.get_vocab()) == set(tokenizer.get_added_vocab())


@contextmanager
def quiet():
    """Load without a bar for a moment's work, and without a table of what is left over (of a SigLIP
    folder its text tower, on purpose)."""
    logger = logging.getLogger("transformers")
    level, has_bars = logger.level, hf_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if has_bars:
            hf_logging.enable_progress_bar()


def read_json(path: Path, what: str) -> dict:
    """A JSON object of a model folder. Raises ModelFolderError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{what} = {path.parent}: {path.name} is not readable: "
                               f"{error}") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{what} = {path.parent}: {path.name} is no JSON object; copy the "
                               "file again")
    return content


def _reason(error) -> str:
    """The first line of another library's error; one about code to run in our words."""
    if "trust_remote_code" in str(error):
        return ("it asks for code of its own to be run (auto_map), and code from a model folder is "
                "not run; take a model of a type that transformers knows")
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
