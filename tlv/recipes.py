"""What is tuned and how fast: trainable parts, learning-rate groups, the schedule.

A recipe is an explicit list of parts with a peak learning rate each; a part without a rate is
frozen. Sources: TinyLLaVA section 3 (base, share), TinyLLaVA Factory (LoRA, share with the encoder
frozen), TinyLLaVA-Video section 3. Taught in notebooks 03 and 04.
"""

import math
import re

from tlv.train_config import PARTS
from tlv.vision import count_seen_layers

# Fields of TrainConfig, per recipe and stage, as published. Batches and data: params/.
BASE_PRETRAIN = dict(trainable=["connector"], lr_connector=1e-3)
BASE_SFT = dict(trainable=["connector", "llm"], lr_connector=2e-5, lr_llm=2e-5)
SHARE = dict(BASE_SFT, trainable=["connector", "llm", "vision"], lr_vision=2e-5)
LORA = dict(BASE_SFT, lr_connector=2e-4, lr_llm=2e-4, lora=["llm"], lora_rank=128, lora_alpha=256)
RECIPES = {
    "base": {"pretrain": BASE_PRETRAIN, "sft": BASE_SFT},
    # The paper's: a second pretraining, with the encoder's layers from 12 of SigLIP's 27 on. Of
    # other encoders as deep a share; the paper counts 12 for CLIP's 24 too (vision_from 0.5).
    "share": {"pretrain": BASE_PRETRAIN, "pretrain_share": dict(SHARE, vision_from=12 / 27),
              "sft": BASE_SFT},
    # The shipped scripts': the encoder stays frozen.
    "share_frozen": {"pretrain": BASE_PRETRAIN, "pretrain_share": BASE_SFT, "sft": BASE_SFT},
    "lora": {"pretrain": BASE_PRETRAIN, "sft": LORA},
    # Adapters on the encoder too, as Factory's tune_type_vision_tower: lora has it.
    "lora_vision": {"pretrain": BASE_PRETRAIN,
                    "sft": dict(LORA, trainable=["connector", "llm", "vision"], lr_vision=2e-4,
                                lora=["llm", "vision"])},
    "qlora": {"pretrain": BASE_PRETRAIN, "sft": dict(LORA, quantize="int8")},
    "qlora_nf4": {"pretrain": BASE_PRETRAIN, "sft": dict(LORA, quantize="nf4")},  # QLoRA's own
    "video": {"pretrain": dict(trainable=["connector"], lr_connector=1e-4), "sft": BASE_SFT},
}  # fmt: skip
MODULES = {"connector": "connector", "llm": "language_model", "vision": "vision_encoder"}


def published(recipe: str, stage: str, **given) -> dict:
    """The TrainConfig fields of a published recipe; what is `given` and not None replaces them.

    ValueError for an unknown recipe, or one without such a stage, listing the known.
    """
    for name, known in ((recipe, RECIPES), (stage, RECIPES.get(recipe, {}))):
        if name not in known:
            what = "recipe" if known is RECIPES else f"stage of the recipe {recipe!r}"
            raise ValueError(f"{name!r} is no {what}; known are {', '.join(known)}")
    return RECIPES[recipe][stage] | {k: v for k, v in given.items() if v is not None}


def part_module(model, part: str):
    """The model's child that is `part`, one of the keys of MODULES."""
    if part not in MODULES:
        raise KeyError(f"part {part!r} is unknown; parts are {', '.join(MODULES)}")
    return getattr(model, MODULES[part])


def set_trainable(model, trainable, lora=(), vision_from: float = 0.0) -> dict[str, int]:
    """Freeze everything but the parts named; return the number of trained parameters per part.

    Of a part in `lora` the adapters alone are trained. Of the encoder, where it is trained, the
    layers from the share `vision_from` of its depth on (0: all of it), and never what the output
    does not see. ValueError if a part that should be trained is left with nothing to train.
    """
    counts = {}
    for part in PARTS:
        module = part_module(model, part).requires_grad_(part in trainable and part not in lora)
        if part in trainable and part in lora:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(".lora_" in name)
        elif part == "vision" and part in trainable:
            _set_encoder(model, module, vision_from)
        counts[part] = sum(p.numel() for p in module.parameters() if p.requires_grad)
        if part in trainable and not counts[part]:
            raise ValueError(f"trainable names {part!r}, but nothing of it would be trained"
                             + (f" with vision_from = {vision_from:g}" if part == "vision" else ""))
    return counts


def _set_encoder(model, encoder, vision_from: float) -> None:
    """Train the encoder's layers from `vision_from` on, and all that comes first where it is 0."""
    for name, parameter in encoder.named_parameters():
        place = seen_layer(model.config, name)
        if place is None:
            is_first = "embeddings." in name or "pre_layrnorm." in name
            parameter.requires_grad_(is_first and not vision_from and "mask_token" not in name)
        else:
            number, depth, is_seen = place
            parameter.requires_grad_(is_seen and number >= round(vision_from * depth))


def seen_layer(config, name: str) -> tuple[int, int, bool] | None:
    """The encoder's layer that `name` lies in: its number, of how many, and whether the output sees
    it. None for a name outside the layers."""
    number = re.search(r"encoder\.layers?\.(\d+)\.", name)
    if not number:
        return None
    mixed = re.search(r"encoders\.(\d)\.", name)
    part = config.vision_config
    depth = (part.parts[int(mixed[1])] if mixed else part).num_hidden_layers
    num_seen = count_seen_layers(depth, config.vision_feature_layer)
    return int(number[1]), depth, int(number[1]) < num_seen


def parameter_groups(model, learning_rates: dict, weight_decay: float) -> list[dict]:
    """AdamW groups: per trained part the matrices (decayed) and the biases and norms (not).

    learning_rates: peak rate per part, None = frozen. A group's `peak` feeds the schedule.
    """
    groups = []
    for part, peak in learning_rates.items():
        if peak is None:
            continue
        params = [p for p in part_module(model, part).parameters() if p.requires_grad]
        matrices = [p for p in params if p.ndim >= 2]
        vectors = [p for p in params if p.ndim < 2]  # biases and the affine terms of norms
        for members, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if members:
                groups.append({"params": members, "lr": peak, "weight_decay": decay,
                               "part": part, "peak": peak})
    return groups


def count_warmup_steps(warmup_ratio: float, num_steps: int) -> int:
    """ceil(ratio * steps), as the published recipe rounds it."""
    return math.ceil(warmup_ratio * num_steps)


def learning_rate(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear from 0 over `warmup_steps`, then half a cosine to 0 at `num_steps`.

    step counts optimizer steps from 0. A pure function: nothing of it has to be saved.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
