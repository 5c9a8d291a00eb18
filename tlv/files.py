"""Small files written whole or not at all: a reader never meets half of one."""

import json
import os
from pathlib import Path


def write_bytes(path, data: bytes) -> None:
    """Write to a neighbour, then rename: atomic on one file system."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_bytes(data)
    os.replace(draft, path)


def write_text(path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
