"""Typed, frozen settings from flat YAML or JSON: unknown keys and wrong types are refused.

YAML 1.1 (PyYAML, Papermill) reads `1e-4` as a string and `yes` as true, YAML 1.2 (DVC) as a number
and as a string: both spellings are refused here, so that every reader of a file sees the same.
Taught in notebooks 03 and 04.
"""

import dataclasses
import json
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from tlv import ROOT

PARTS = ("connector", "llm", "vision")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
YAML_11_BOOLS = {"y", "yes", "n", "no", "on", "off"}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the file, the key, the value, the remedy."""


def require(is_right, name: str, value, what: str) -> None:
    """Raise ConfigError for a notebook's parameter that is not `what` it must be."""
    if not is_right:
        raise ConfigError(f"parameters: {name} = {value!r} must be {what}")


# ---- reading --------------------------------------------------------------------------------


def resolve(path) -> Path:
    """A path from a settings file: relative ones start at the project's root."""
    return ROOT / path  # an absolute `path` stays as it is


def portable(path) -> str:
    """The inverse of `resolve`: relative to the root where inside it, so equal in every clone."""
    path = resolve(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _check_scalar(path, key: str, node) -> None:
    if node.style is not None:  # quoted: a string on purpose
        return
    if node.tag.endswith(":str") and NUMBER.fullmatch(node.value):
        mantissa, _, exponent = node.value.lower().partition("e")
        mantissa += "" if "." in mantissa else ".0"
        sign = "" if exponent[:1] in "+-" else "+"
        right = f"{mantissa}e{sign}{exponent}"
        raise ConfigError(f"{path}: {key} = {node.value} is a string in YAML 1.1; write {right}")
    if node.value.lower() in YAML_11_BOOLS:
        raise ConfigError(f"{path}: {key} = {node.value} is a bool in one YAML and a string in "
                          "another; write true, false or a quoted string")


def _is_written_by_dvc(node) -> bool:
    """Is it a small number as `dvc exp run -S` writes it, 1e-05? To YAML 1.1 it is a string."""
    is_number = node.style is None and NUMBER.fullmatch(node.value)
    return node.tag.endswith(":str") and is_number and node.value == repr(float(node.value))


def load_params(path) -> dict:
    """Read a flat YAML mapping (values: scalars or lists). Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such params file")
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    seen = set()
    for key, node in root.value:
        if key.value in seen:
            raise ConfigError(f"{path}: {key.value} is given twice; keep one")
        seen.add(key.value)
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(item, yaml.ScalarNode):
                raise ConfigError(f"{path}: {key.value} is nested; the file must be flat")
            if _is_written_by_dvc(item):
                item.tag = "tag:yaml.org,2002:float"
            _check_scalar(path, key.value, item)
    return yaml.SafeLoader("").construct_document(root)


def load_json(path):
    """Read a JSON file. Raises ConfigError with the path."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error


# ---- types ----------------------------------------------------------------------------------


def _describe(kind) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin is tuple:
        return f"a list, each {_describe(args[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(a) for a in args)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, "null")


def _convert(kind, value):
    """`value` as `kind`, or TypeError. An integer serves as a float; a bool never as a number."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for arg in args:
            try:
                return _convert(arg, value)
            except TypeError:
                pass
        raise TypeError
    if origin is Literal and isinstance(value, str) and value in args:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(args[0], item) for item in value)
    if kind is type(None) and value is None:
        return None
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    raise TypeError


def build(cls, mapping: dict, source: str = ""):
    """Make the frozen dataclass `cls` from `mapping`; `source` (a file) opens every message."""
    where = f"{source}: " if source else ""
    kinds = typing.get_type_hints(cls)
    for key in mapping:
        if key not in kinds:
            raise ConfigError(f"{where}unknown key {key!r}; known keys: {', '.join(kinds)}")
    needed = [f.name for f in dataclasses.fields(cls)
              if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in mapping]
    if missing:
        raise ConfigError(f"{where}missing key {', '.join(missing)}")
    values = {}
    for key, value in mapping.items():
        try:
            values[key] = _convert(kinds[key], value)
        except TypeError:
            right = _describe(kinds[key])
            raise ConfigError(f"{where}{key} = {value!r} must be {right}") from None
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


# ---- the trainer's settings -----------------------------------------------------------------


def _require(claim: bool, message: str) -> None:
    if not claim:
        raise ConfigError(message)


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
    tensorboard: bool = False  # needs the package tensorboard

    def __post_init__(self):
        _require(bool(self.trainable), f"trainable is empty; name some of {PARTS}")
        for part in PARTS:
            rate, is_trained = self.learning_rates()[part], part in self.trainable
            _require(not is_trained or rate is not None,
                     f"trainable names {part!r}, so lr_{part} must be a number")
            _require(is_trained or rate is None,
                     f"lr_{part} = {rate} but trainable does not name {part!r}; "
                     "add it there or remove the rate")
            _require(rate is None or rate > 0, f"lr_{part} = {rate} must be > 0")
        _require((self.num_steps is None) != (self.num_epochs is None),
                 f"num_steps = {self.num_steps}, num_epochs = {self.num_epochs}: give exactly one")
        for name in ("num_steps", "num_epochs", "micro_batch_size", "grad_accum_steps",
                     "num_threads", "val_every", "save_every", "max_grad_norm",
                     "decode_timeout_s", "lora_rank", "lora_alpha"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} = {value} must be > 0")
        for name, low, high in (("warmup_ratio", 0, 1), ("max_bad_share", 0, 1),
                                ("vision_from", 0, 1), ("lora_dropout", 0, 1)):
            value = getattr(self, name)
            _require(low <= value <= high, f"{name} = {value} must lie in [{low}, {high}]")
        for name in ("weight_decay", "num_workers", "seed"):
            _require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)} must be >= 0")
        _require(not (self.cache_features and "vision" in self.trainable),
                 "cache_features needs a frozen vision encoder; take 'vision' out of trainable")
        for part in self.lora:
            _require(part in self.trainable, f"lora names {part!r}, which trainable does not")
        _require(not self.vision_from or "vision" in self.trainable,
                 f"vision_from = {self.vision_from:g} but trainable does not name 'vision'")
        for name in ("adapter_dir", "quantize"):
            _require(getattr(self, name) is None or bool(self.lora),
                     f"{name} = {getattr(self, name)!r} needs lora, the parts that it is for")
        _require((self.val_every is None) or self.val_data is not None,
                 f"val_every = {self.val_every} needs val_data")

    def learning_rates(self) -> dict[str, float | None]:
        """Peak learning rate of each part; None is frozen."""
        return {"connector": self.lr_connector, "llm": self.lr_llm, "vision": self.lr_vision}


@dataclass(frozen=True)
class LaunchConfig:
    """How ranks are started; how many are on one machine, and which machines there are."""

    num_ranks: int = 1  # per machine
    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    num_nodes: int = 1  # machines
    node_rank: int = 0  # this machine's number (torchrun: run the command on every machine)
    master_addr: str = "127.0.0.1"
    master_port: int | None = None  # None: a free one
    hostfile: str | None = None  # deepspeed: "name slots=8" per line, reached over ssh

    def __post_init__(self):
        for name in ("num_ranks", "num_nodes"):
            _require(getattr(self, name) > 0, f"{name} = {getattr(self, name)} must be > 0")
        _require(0 <= self.node_rank < self.num_nodes,
                 f"node_rank = {self.node_rank} must lie in [0, num_nodes = {self.num_nodes})")
        _require(self.hostfile is None or self.launcher == "deepspeed",
                 f"hostfile = {self.hostfile!r} is read by launcher: deepspeed only")
        _require(self.master_port is None or 0 < self.master_port < 65536,
                 f"master_port = {self.master_port} must lie in 1 to 65535; null takes a free one")
        is_far = self.num_nodes > 1 or self.hostfile is not None
        _require(not is_far or self.master_addr != "127.0.0.1",
                 "several machines need master_addr, the address of the first one")
        _require(not is_far or self.master_port is not None,
                 "several machines need master_port, a port free on the first one")
        _require(self.num_nodes == 1 or self.launcher == "torchrun" or self.hostfile is not None,
                 f"num_nodes = {self.num_nodes} with launcher: deepspeed needs a hostfile")

    @property
    def world_size(self) -> int:
        """Ranks on all machines together."""
        return self.num_ranks * self.num_nodes


def as_dict(config) -> dict:
    """A config as JSON holds it: tuples as lists, paths inside the project relative to its root."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in ("model_dir", "data", "videos_dir", "out_dir", "val_data", "zero_config",
                 "adapter_dir"):
        if values.get(name) is not None:
            values[name] = portable(values[name])
    return values
