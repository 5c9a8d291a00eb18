"""Published checkpoint folders: which layout one has, and its weights under our names.

Layouts: "flat" (TinyLLaVA-Video, TinyLLaVA Factory), "parts" (three folders, of a pretraining run),
"lora" (three folders and an adapter), "legacy" (TinyLLaVABench). Taught in notebook 02.
"""

import re
from pathlib import Path

import torch
from safetensors import safe_open

from tlv.pretrained import ModelFolderError, read_json, read_shards, rewritten

LEGACY_LLMS = {
    "TinyLlavaLlamaForCausalLM": "llama",
    "TinyLlavaStablelmForCausalLM": "stablelm",
    "TinyLlavaPhiForCausalLM": "phi",
}
LEGACY_PREFIXES = {
    "model.vision_tower.vision_tower.": "vision_tower._vision_tower.",
    "model.mm_projector.": "connector._connector.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
PARTS = {  # of a pretraining run: folder, and what its names stand below in a flat folder
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}
# Buffers of old versions of transformers, computed anew when a model is made.
IGNORED = re.compile(r"\.(position_ids|inv_freq|masked_bias|attn\.bias)$")
OTHER_LORA = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
DINOV2_NAMES = {  # transformers 5 has other ones
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}


# ---- what a folder is -----------------------------------------------------------------------


def find_layout(source: Path) -> str:
    """"lora", "parts", "legacy" or "flat". Raises ModelFolderError for another system's folder."""
    if not (source / "config.json").is_file():
        raise ModelFolderError(f"{source}: no config.json in it; a published TinyLLaVA or "
                               "TinyLLaVA-Video folder is wanted")
    raw = read_json(source / "config.json", "source")
    if raw.get("model_type") == "tinyllava":
        if (source / "adapter_config.json").is_file():
            return "lora"
        return "parts" if all((source / part).is_dir() for part in PARTS) else "flat"
    if set(raw.get("architectures") or []) & set(LEGACY_LLMS):
        return "legacy"
    raise ModelFolderError(
        f"{source}: model_type {raw.get('model_type')!r} with architectures "
        f"{raw.get('architectures')} is another system's; known are 'tinyllava' and "
        f"{', '.join(LEGACY_LLMS)}"
    )


# ---- weights --------------------------------------------------------------------------------


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder: safetensors before .bin, sharded or not; shards must be complete."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        files = read_shards(index, "source") if index.is_file() else []
        files = files or [f"{stem}.{ending}"] * (folder / f"{stem}.{ending}").is_file()
        if files:
            pairs = (pair for name in files for pair in _read_file(folder / name).items())
            weights = _by_name(folder, pairs)
            return _floats(folder, {k: v for k, v in weights.items() if not IGNORED.search(k)})
    raise ModelFolderError(f"{folder}: no weights in it (model.safetensors or pytorch_model.bin, "
                           "or an index of several)")


def _by_name(folder: Path, pairs) -> dict[str, torch.Tensor]:
    """A dict of weights, none of which may hide another."""
    weights = {}
    for name, tensor in pairs:
        if name in weights:
            raise ModelFolderError(f"{folder}: there are two weights {name}; one is expected")
        weights[name] = tensor
    return weights


def _floats(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights, none of which may be integers: those mean nothing without their scales."""
    if odd := [f"{k} ({v.dtype})" for k, v in weights.items() if not v.is_floating_point()]:
        raise ModelFolderError(f"{folder}: {len(odd)} weights are quantized, such as {odd[0]}; "
                               "take the LLM's own in their place")
    return weights


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a torn file; or a pickle of more than tensors
        raise ModelFolderError(f"{path}: not readable as tensors: {str(error)[:200]}") from error


def collect(source: Path, layout: str) -> dict[str, torch.Tensor]:
    """The weights of any layout under the names of a flat folder, adapters merged."""
    if layout == "flat":
        return read_weights(source)
    if layout == "legacy":
        return _by_name(source, ((_modernise(k), v) for k, v in read_weights(source).items()))
    weights = _by_name(source, (
        (prefix + name.replace(".base_layer.", "."), tensor)
        for part, prefix in PARTS.items() for name, tensor in read_weights(source / part).items()
    ))  # fmt: skip
    if layout == "lora":
        merge_adapter(source, weights)
    return weights


def _modernise(name: str) -> str:
    for old, new in LEGACY_PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def merge_adapter(source: Path, weights: dict[str, torch.Tensor]) -> None:
    """Add each adapter's alpha / r * B A to its matrix, in float32. All of the adapter is used."""
    settings = read_json(source / "adapter_config.json", "source")
    if others := [name for name in OTHER_LORA if settings.get(name)]:
        raise ModelFolderError(f"{source}: adapter_config.json asks for {', '.join(others)}; plain "
                               "LoRA is what TinyLLaVA Factory writes")
    if not settings.get("r") or settings.get("lora_alpha") is None:
        raise ModelFolderError(f"{source}: adapter_config.json lacks r or lora_alpha, of which "
                               "the adapter's weight follows")
    scale = settings["lora_alpha"] / settings["r"]
    path = source / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelFolderError(f"{source}: no {path.name} in it"
                               + rewritten(source, "adapter_model.bin", path.name))
    for name, (down, up) in _pair(source, _read_file(path)).items():
        if name not in weights:
            raise ModelFolderError(f"{source}: the adapter of {name} has no matrix to add to")
        base, change = weights[name], scale * up.float() @ down.float()
        if change.shape != base.shape:
            raise ModelFolderError(f"{source}: the adapter of {name} is {tuple(change.shape)} and "
                                   f"its matrix {tuple(base.shape)}; they are of two models")
        weights[name] = (base.float() + change).to(base.dtype)


def _pair(source: Path, adapter: dict[str, torch.Tensor]) -> dict:
    """An adapter's tensors as {the matrix that they change: (A, B)}. Raises ModelFolderError."""
    pairs = {}
    for name, tensor in adapter.items():
        stem, kind = re.fullmatch(r"(.*?)(?:\.lora_([AB])\.weight)?", name).groups()
        if kind is None:
            raise ModelFolderError(f"{source}: adapter_model.safetensors holds {name}, which is "
                                   "no LoRA matrix (.lora_A.weight, .lora_B.weight)")
        other = f"{stem}.lora_{'B' if kind == 'A' else 'A'}.weight"
        if other not in adapter:
            raise ModelFolderError(f"{source}: adapter_model.safetensors holds {name} but not "
                                   f"{other}; the copy is unfinished")
        pairs.setdefault(stem.removeprefix("base_model.model.") + ".weight", {})[kind] = tensor
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def rename(name: str) -> str:
    """A flat folder's name -> ours."""
    if name.startswith("vision_tower._vision_tower."):
        rest = name.removeprefix("vision_tower._vision_tower.")
        for number, kind in enumerate(("clip.", "dinov2.")):  # a mixture
            if rest.startswith(kind):
                return f"vision_encoder.encoders.{number}." + _bare(rest.removeprefix(kind))
        return "vision_encoder." + _bare(rest)
    if name.startswith("connector._connector."):
        rest = name.removeprefix("connector._connector.")
        if rest in ("weight", "bias"):  # `linear` is a bare matrix
            rest = f"0.{rest}"
        rest = re.sub(r"^(\d+)\.(weight|bias)$", r"layers.\1.\2", rest)
        return "connector." + re.sub(r"^clip\.", "mlps.0.", re.sub(r"^dinov2\.", "mlps.1.", rest))
    return name


def _bare(name: str) -> str:
    for old, new in DINOV2_NAMES.items():
        name = name.replace(old, new)
    return name.removeprefix("vision_model.")  # transformers 5 has no such level
