"""The trainer's settings, typed, frozen and checked. Taught in notebooks 03 and 04."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from tlv.config import demand, portable

PARTS = ("connector", "llm", "vision")


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training. Paths are relative to the project's root, or absolute.

    What the model is (connector, frames, template) is not here: it travels in `model_dir`.
    """

    model_dir: str  # a tlv Hugging Face folder
    data: str  # the manifest, LLaVA JSON
    videos_dir: str
    out_dir: str
    seed: int = 0
    val_data: str | None = None
    template: str | None = None  # None: the model's own
    turns: Literal["packed", "separate", "isolated"] = "packed"
    spread_positions: bool = False  # random gaps between video tokens, over the LLM's context
    trainable: tuple[Literal["connector", "llm", "vision"], ...] = ("connector",)
    lr_connector: float | None = None  # peak learning rates; None: frozen
    lr_llm: float | None = None
    lr_vision: float | None = None
    vision_from: float = 0.0  # share of the encoder's layers, from below, that stay frozen
    lora: tuple[Literal["connector", "llm", "vision"], ...] = ()  # of them, through adapters
    lora_rank: int = 128
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05
    adapter_dir: str | None = None  # an adapter to go on with; None: a new one
    quantize: Literal["int8", "nf4"] | None = None  # QLoRA: of `lora`, the frozen matrices
    optimizer: Literal["adamw", "muon"] = "adamw"  # published: adamw
    num_steps: int | None = None  # optimizer steps; exactly one of num_steps and num_epochs
    num_epochs: int | None = None
    micro_batch_size: int = 4  # samples per rank and forward pass
    grad_accum_steps: int = 1
    group_by_length: bool = False  # global batches of one modality and like length: less padding
    warmup_ratio: float = 0.03  # of num_steps
    weight_decay: float = 0.0
    max_grad_norm: float | None = None  # None: no clipping
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    zero_config: str = "params/deepspeed_zero0.json"
    val_every: int | None = None  # steps; None: no validation
    save_every: int | None = None  # steps; None: no checkpoint to resume from
    cache_features: bool = False  # needs a frozen vision encoder
    decode_timeout_s: float | None = 60.0  # seconds per clip; None: no protection
    num_workers: int = 0  # data-loading processes per rank
    max_bad_share: float = 0.05  # of the samples
    num_threads: int = 1  # per rank, on the CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self):
        demand(bool(self.trainable), f"trainable is empty; name some of {PARTS}")
        for part in PARTS:
            rate, is_trained = self.learning_rates()[part], part in self.trainable
            demand(not is_trained or rate is not None,
                   f"trainable names {part!r}, so lr_{part} must be a number")
            demand(is_trained or rate is None,
                   f"lr_{part} = {rate} but trainable does not name {part!r}; "
                   "add it there or remove the rate")
            demand(rate is None or rate > 0, f"lr_{part} = {rate} must be > 0")
        demand((self.num_steps is None) != (self.num_epochs is None),
               f"num_steps = {self.num_steps}, num_epochs = {self.num_epochs}: give exactly one")
        for name in ("num_steps", "num_epochs", "micro_batch_size", "grad_accum_steps",
                     "num_threads", "val_every", "save_every", "max_grad_norm",
                     "decode_timeout_s", "lora_rank", "lora_alpha"):
            value = getattr(self, name)
            demand(value is None or value > 0, f"{name} = {value} must be > 0")
        for name, low, high in (("warmup_ratio", 0, 1), ("max_bad_share", 0, 1),
                                ("vision_from", 0, 1), ("lora_dropout", 0, 1)):
            value = getattr(self, name)
            demand(low <= value <= high, f"{name} = {value} must lie in [{low}, {high}]")
        for name in ("weight_decay", "num_workers", "seed"):
            demand(getattr(self, name) >= 0, f"{name} = {getattr(self, name)} must be >= 0")
        demand(not (self.cache_features and "vision" in self.trainable),
               "cache_features needs a frozen vision encoder; take 'vision' out of trainable")
        for part in self.lora:
            demand(part in self.trainable, f"lora names {part!r}, which trainable does not")
        demand(not self.vision_from or "vision" in self.trainable,
               f"vision_from = {self.vision_from:g} but trainable does not name 'vision'")
        demand(not self.vision_from or "vision" not in self.lora,
               f"vision_from = {self.vision_from:g} says nothing where lora names 'vision'")
        for name in ("adapter_dir", "quantize"):
            demand(getattr(self, name) is None or bool(self.lora),
                   f"{name} = {getattr(self, name)!r} needs lora, the parts that it is for")
        demand((self.val_every is None) or self.val_data is not None,
               f"val_every = {self.val_every} needs val_data")

    def learning_rates(self) -> dict[str, float | None]:
        """Peak learning rate of each part; None is frozen."""
        return {"connector": self.lr_connector, "llm": self.lr_llm, "vision": self.lr_vision}


def as_dict(config) -> dict:
    """A config as JSON holds it: tuples as lists, paths inside the project relative to its root."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in ("model_dir", "data", "videos_dir", "out_dir", "val_data", "zero_config",
                 "adapter_dir"):
        if values.get(name) is not None:
            values[name] = portable(values[name])
    return values
