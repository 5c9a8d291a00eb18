"""Typed, frozen settings from flat YAML or JSON: unknown keys and wrong types are refused.

YAML 1.1 (PyYAML, Papermill) reads `1e-4` as a string and `yes` as true, YAML 1.2 (DVC) as a number
and as a string: both spellings are refused here, so that every reader of a file sees the same.
Taught in notebook 03.
"""

import dataclasses
import json
import re
import types
import typing
from pathlib import Path
from typing import Literal

import yaml

from tlv import ROOT

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# 010 is 8 in one YAML and 10 in the other; 1:30, 0o17, 0b11 and 1_000 a number in one alone.
TWO_NUMBERS = re.compile(r"[-+]?(0[\d_]+|0o[0-7]+|0b[01_]+|\d+(:\d+)+|\d+_[\d_]*)(\.\d*)?")
YAML_11_BOOLS = {"y", "yes", "n", "no", "on", "off"}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the file, the key, the value, the remedy."""


def demand(is_right: bool, message: str) -> None:
    """Raise ConfigError with the message unless it is right."""
    if not is_right:
        raise ConfigError(message)


def require(is_right, name: str, value, what: str) -> None:
    """Raise ConfigError for a notebook's parameter that is not `what` it must be."""
    demand(is_right, f"parameters: {name} = {value!r} must be {what}")


# ---- reading --------------------------------------------------------------------------------


def resolve(path) -> Path:
    """A path from a settings file: relative ones start at the project's root."""
    return ROOT / path  # an absolute `path` stays as it is


def portable(path) -> str:
    """The inverse of `resolve`: relative to the root where inside it, so equal in every clone."""
    path = resolve(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def resume_root(out_dir) -> Path:
    """Where unfinished runs of the stage that writes `out_dir` live: never inside `out_dir`."""
    out_dir, outputs = resolve(out_dir).resolve(), ROOT / "outputs"
    if out_dir.is_relative_to(outputs):
        return outputs / ".resume" / out_dir.relative_to(outputs)
    return out_dir.parent / ".resume" / out_dir.name


def _check_scalar(path, key: str, node) -> None:
    if node.style is not None:  # quoted: a string on purpose
        return
    if node.tag.endswith(":str") and NUMBER.fullmatch(node.value):
        mantissa, _, exponent = node.value.lower().partition("e")
        mantissa += "" if "." in mantissa else ".0"
        sign = "" if exponent[:1] in "+-" else "+"
        right = f"{mantissa}e{sign}{exponent}"
        raise ConfigError(f"{path}: {key} = {node.value} is a string in YAML 1.1; write {right}")
    is_grouped = "_" in node.value and not node.tag.endswith(":str")  # 1_000, 1.0_0, 0x_1
    if is_grouped or TWO_NUMBERS.fullmatch(node.value):
        raise ConfigError(f"{path}: {key} = {node.value} is another value in YAML 1.1 than in 1.2; "
                          "write plain digits, or quote a string")
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
    text = _read(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error


def load_json_lines(path) -> list:
    """Read a file of one JSON value a line; empty lines do not count. Raises ConfigError.

    Only a line feed ends a line: JSON may hold U+2028 and its like as they are, and
    `str.splitlines` would cut there.
    """
    values = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: not valid JSON: {error}") from error
    return values


def _read(path) -> str:
    try:
        return Path(path).read_text()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except OSError as error:  # a folder, say
        raise ConfigError(f"{path}: not readable: {error}") from error
    except UnicodeDecodeError as error:
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
