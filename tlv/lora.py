"""LoRA: a part's matrices stay, and beside each a product of two small ones is trained.

y = W x + alpha / r * B A x, with A (r, in) random and B (out, r) zero at the start (arXiv
2106.09685). An adapter is saved in PEFT's form, and merged into the finished checkpoint, which is
then a model like any other. Taught in notebook 04.
"""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from tlv.checkpoint import publish
from tlv.pretrained import ModelFolderError
from tlv.recipes import part_module

PREFIX = "base_model.model."  # before every name in a PEFT file


def target_names(model, parts) -> list[str]:
    """Every matrix in the layers of `parts` ("llm", "vision"); an LLM's head is not among them."""
    modules = {id(m) for part in parts for m in part_module(model, part).modules()}
    return [
        name for name, module in model.named_modules()
        if id(module) in modules and type(module) is nn.Linear
        and (".layers." in name or ".layer." in name)
    ]  # fmt: skip


def add_adapters(model, parts, *, rank, alpha, dropout, adapter_dir=None) -> None:
    """Give the matrices of `parts` an adapter, new or, to go on, that of `adapter_dir`."""
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none",
                          target_modules=target_names(model, parts))  # fmt: skip
    inject_adapter_in_model(settings, model)
    model.adapter_settings = settings
    if adapter_dir is None:
        return
    path = Path(adapter_dir) / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelFolderError(f"adapter_dir = {adapter_dir}: no {path.name} in it")
    saved, own = load_file(path), adapter_weights(model.state_dict())
    shapes, wanted = ({k: tuple(v.shape) for k, v in x.items()} for x in (saved, own))
    if shapes != wanted:
        wrong = sorted(k for k in shapes | wanted if shapes.get(k) != wanted.get(k))
        raise ModelFolderError(f"adapter_dir = {adapter_dir}: not this model's adapter; "
                               f"{len(wrong)} of its weights differ, such as {wrong[0]}: "
                               f"{shapes.get(wrong[0])}, wanted {wanted.get(wrong[0])}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def adapter_weights(state: dict) -> dict:
    """The adapter's tensors of a state dict, under PEFT's names."""
    return {PREFIX + name.replace(".default.", "."): tensor
            for name, tensor in state.items() if ".lora_" in name}  # fmt: skip


def merge(state: dict, settings: LoraConfig) -> dict:
    """A state dict with adapters -> that of the plain model: each W becomes W + alpha / r * B A."""
    merged = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix(".base_layer.weight")
            down, up = (state[f"{stem}.lora_{x}.default.weight"].float() for x in "AB")
            scale = settings.lora_alpha / settings.r
            tensor = (tensor.float() + scale * up @ down).to(tensor.dtype)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def save_adapter(state: dict, settings: LoraConfig, final: Path) -> None:
    """Write the folder `final`, as `PeftModel.from_pretrained` reads it, whole or not at all."""
    draft = final.with_name(final.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in adapter_weights(state).items()},
              draft / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    settings.save_pretrained(draft)
    publish(draft, final)
