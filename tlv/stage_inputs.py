"""What a person may edit while a stage runs, and its results follow from.

DVC looks at code and settings only after a stage, and at a copy of its notebook made before all.
"""

import hashlib
import json
import os

from tlv import ROOT, notebooks
from tlv.code_copy import code_only
from tlv.config import load_params
from tlv.notebook_parameters import NotebookError
from tlv.pipeline import stage_modules


def files_of(name: str, preset: str, given: dict) -> list[str]:
    """The files. `given`: all parameters, which may name other files. Raises NotebookError."""
    settings = {v for v in given.values() if isinstance(v, str) and v.startswith("params/")}
    try:
        modules = stage_modules(name, ROOT)
    except SyntaxError as error:
        raise NotebookError(f"notebooks/{name}.ipynb, or a module of tlv that it needs, is not "
                            f"plain Python: {error.text or error!s}") from error  # fmt: skip
    return sorted({f"notebooks/{name}.ipynb", f"params/{preset}/{name}.yaml", *settings, *modules})


def digests(files) -> dict[str, str]:
    """File -> digest of what counts in it; "unreadable" for one that a person is writing."""
    found = {}
    for file in files:
        try:
            found[file] = hashlib.sha256(_content(file)).hexdigest()
        except (OSError, ValueError, KeyError):
            found[file] = "unreadable"
    return found


def _content(file: str) -> bytes:
    """Of a notebook its code, of settings their values (as DVC compares both), of others all."""
    path = ROOT / file
    if path.suffix == ".ipynb":
        return json.dumps(code_only(json.loads(path.read_text()))).encode()
    if path.suffix == ".yaml":
        return json.dumps(load_params(path), sort_keys=True, default=str).encode()
    return path.read_bytes()


def check_copy(name: str) -> None:
    """Refuse a notebook that is no longer what DVC takes it for, in a run that DVC started."""
    copy = ROOT / "outputs/.code" / f"{name}.ipynb"
    if "DVC_STAGE" in os.environ and copy.is_file():
        code = code_only(notebooks.read(notebooks.FOLDER / f"{name}.ipynb"))
        if json.loads(copy.read_text()) != code:
            raise NotebookError(f"notebooks/{name}.ipynb was changed since this pipeline began; "
                                "start `dvc repro` again")
