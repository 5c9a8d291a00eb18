"""LoRA: a part's matrices stay, and beside each a product of two small ones is trained.

y = W x + alpha / r * B A x, with A (r, in) random and B (out, r) zero at the start (arXiv
2106.09685). An adapter is saved in PEFT's form, and merged into the finished checkpoint, which is
then a model like any other. QLoRA (arXiv 2305.14314) keeps W itself in 8 or 4 bits while B and A
are trained; what is merged in the end is the W of before. Taught in notebook 04.
"""

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from tlv.config import ConfigError, load_json
from tlv.files import draft_of
from tlv.pretrained import ModelFolderError
from tlv.recipes import MODULES, part_module, seen_layer

PREFIX = "base_model.model."  # before every name in a PEFT file
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # as PEFT names its files


def target_names(model, parts) -> list[str]:
    """Every matrix of `parts` ("connector", "llm", "vision") that an adapter is put on.

    Whatever their layers are called: each nn.Linear, of the LLM but for its head, of the encoder
    in the layers that the output sees. ValueError for a part without one, such as GPT-2, whose
    matrices are of another class.
    """
    names = []
    for part in parts:
        module = part_module(model, part)
        found = [name for name, child in module.named_modules()
                 if isinstance(child, nn.Linear) and _is_target(model, part, name, child)]
        if not found:
            raise ValueError(f"lora names {part!r}, but a {type(module).__name__} has no nn.Linear "
                             "for adapters; take it out of lora, or another model for that part")
        names += [f"{MODULES[part]}.{name}" for name in found]
    return names


def _is_target(model, part: str, name: str, matrix) -> bool:
    if part == "vision":
        place = seen_layer(model.config, f"{name}.")
        return place is not None and place[2]
    return part == "connector" or matrix is not model.language_model.get_output_embeddings()


def find_bitsandbytes(form: str):
    """The library that holds matrices in few bits, no dependency of this package. ConfigError."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(f"quantize = {form!r} needs bitsandbytes: pip install "
                          "bitsandbytes==0.50.2, or set quantize to null") from error
    return bitsandbytes


def quantize(model, parts, form: str, dtype, device) -> None:
    """Put the matrices of `parts` into 8 bits ("int8") or 4 ("nf4"), for adapters to be added.

    `dtype` is that of what goes through them. Raises ConfigError as `find_bitsandbytes` does.
    """
    bnb = find_bitsandbytes(form)
    for name in target_names(model, parts):
        old = model.get_submodule(name)
        sizes = dict(input_features=old.in_features, output_features=old.out_features,
                     bias=old.bias is not None)  # fmt: skip
        if form == "nf4":
            new = bnb.nn.Linear4bit(**sizes, compute_dtype=dtype, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(**sizes, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False,
                                           has_fp16_weights=False)  # fmt: skip
        new.bias = old.bias
        model.set_submodule(name, new.to(device))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = form == "int8", form == "nf4"  # for PEFT


def add_adapters(model, parts, *, rank, alpha, dropout, adapter_dir=None) -> None:
    """Give the matrices of `parts` an adapter, new or, to go on, that of `adapter_dir`."""
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none",
                          target_modules=target_names(model, parts))  # fmt: skip
    inject_adapter_in_model(settings, model)
    model.adapter_settings = settings
    if adapter_dir is None:
        return
    path = Path(adapter_dir) / WEIGHTS
    if not path.is_file():
        raise ModelFolderError(f"adapter_dir = {adapter_dir}: no {path.name} in it")
    saved, own = load_file(path), adapter_weights(model.state_dict())
    shapes, wanted = ({k: tuple(v.shape) for k, v in x.items()} for x in (saved, own))
    if shapes != wanted:
        wrong = sorted(k for k in shapes | wanted if shapes.get(k) != wanted.get(k))
        raise ModelFolderError(f"adapter_dir = {adapter_dir}: not this model's adapter; "
                               f"{len(wrong)} of its weights differ, such as {wrong[0]}: "
                               f"{shapes.get(wrong[0])}, wanted {wanted.get(wrong[0])}")
    theirs = load_json(path.with_name(SETTINGS)).get("lora_alpha")
    if theirs != alpha:
        raise ModelFolderError(f"{path.with_name(SETTINGS)}: trained with lora_alpha = {theirs}, "
                               f"and lora_alpha = {alpha} would rescale it; set lora_alpha to "
                               f"{theirs}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def adapter_weights(state: dict) -> dict:
    """The adapter's tensors of a state dict, under PEFT's names."""
    return {PREFIX + name.replace(".default.", "."): tensor
            for name, tensor in state.items() if ".lora_" in name}  # fmt: skip


def merge(state: dict, settings: LoraConfig, originals: dict | None = None) -> dict:
    """A state dict with adapters -> that of the plain model: each W becomes W + alpha / r * B A.

    `originals` is the plain model's state before it was quantized: what stands in for a W of few
    bits, and which names there are.
    """
    merged = {}
    for name, tensor in state.items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in name or (originals and plain not in originals):
            continue
        if not tensor.is_floating_point():
            tensor = originals[plain]
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix(".base_layer.weight")
            down, up = (state[f"{stem}.lora_{x}.default.weight"].float() for x in "AB")
            scale = settings.lora_alpha / settings.r
            tensor = (tensor.float() + scale * up @ down).to(tensor.dtype)
        merged[plain] = tensor
    return merged


def save_adapter(state: dict, settings: LoraConfig, final: Path) -> None:
    """Write the folder `final`, as `PeftModel.from_pretrained` reads it, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in adapter_weights(state).items()}
    with draft_of(final) as draft:
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        settings.save_pretrained(draft)
