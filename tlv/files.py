"""Small files, and folders, written whole or not at all: a reader never meets half of one."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


def write_bytes(path, data: bytes) -> None:
    """Write to a neighbour, then rename: atomic on one file system. A failure leaves no draft."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def draft_of(final: Path):
    """A folder to fill; it gets its name when it is complete."""
    draft = final.with_name(final.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    publish(draft, final)


def publish(draft: Path, final: Path) -> None:
    """Flush the folder `draft` to disk and rename it to `final`, replacing what was there."""
    for path in [*sorted(draft.rglob("*")), draft]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(draft, final)
    shutil.rmtree(old, ignore_errors=True)
