"""A benchmark's question, and how its files are read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tlv.config import load_json_lines

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


class BenchmarkError(ValueError):
    """A benchmark's file that cannot be used: the message names it, and what would be right."""


@dataclass(frozen=True)
class Question:
    """What is asked of which clip, in the published words.

    `prompt` is without the placeholder; `media` is a clip, a picture or a folder of frames below
    the benchmark's folder, None for text alone. `answer` is the truth in the benchmark's own form,
    None where a server or a judge alone knows it. `frames` chooses frame numbers from a clip's
    number of frames and its frame rate, None: as the model samples; `each_once`: but no frame of a
    short clip twice. `query` is what a model that chooses frames compares them with, "": the
    prompt's first line.
    """

    id: str
    prompt: str
    media: str | None
    answer: object = None
    options: tuple[str, ...] = ()
    group: str = ""  # task, category or length
    frames: Callable | None = None
    each_once: bool = False
    query: str = ""


def read_rows(path: Path, keys=(), lines: bool = False) -> list[dict]:
    """The rows of a .json (a list), .jsonl, .tsv or .parquet file; each must have `keys`.

    lines: a .json file with a row in each line, as POPE's are.
    """
    if not path.is_file():
        raise BenchmarkError(f"{path}: no such file; the folder tree stands in data/README.md")
    try:
        if lines or path.suffix == ".jsonl":
            rows = load_json_lines(path)
        elif path.suffix == ".json":
            rows = json.loads(path.read_text())
        else:
            table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(
                path, sep="\t", dtype=str, keep_default_na=False)  # fmt: skip
            rows = table.to_dict("records")
    except (ValueError, OSError) as error:
        raise BenchmarkError(f"{path}: not readable as {path.suffix[1:]}: {error}") from error
    if not isinstance(rows, list):
        raise BenchmarkError(f"{path}: must hold a list of rows, not a {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BenchmarkError(f"{path}: row {number} is {row!r:.60}; every row must be an "
                                 "object")
        if missing := [key for key in keys if key not in row]:
            raise BenchmarkError(f"{path}: row {number} has no {', '.join(map(repr, missing))}; "
                                 f"it has {', '.join(map(repr, row))}")
    return rows


def read_table(path: Path) -> dict:
    """A .json file that holds an object."""
    if not path.is_file():
        raise BenchmarkError(f"{path}: no such file; the folder tree stands in data/README.md")
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise BenchmarkError(f"{path}: not readable as json: {error}") from error
    if not isinstance(found, dict):
        raise BenchmarkError(f"{path}: must hold an object, not a {type(found).__name__}")
    return found
