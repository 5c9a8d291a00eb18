"""What a person may edit while a stage runs, and its results follow from.

DVC looks at code and settings only after a stage, and at a copy of its notebook made before all.
"""

import hashlib
import json
import os

from tlv import ROOT, notebooks
from tlv.code_copy import code_only
from tlv.notebook_parameters import NotebookError
from tlv.pipeline import stage_modules


def inputs_of(name: str, preset: str, given: dict) -> dict[str, str]:
    """File -> digest of what counts in it. `given`: all parameters, which may name other files."""
    code = code_only(notebooks.read(notebooks.FOLDER / f"{name}.ipynb"))
    settings = {v for v in given.values() if isinstance(v, str) and v.startswith("params/")}
    files = {f"params/{preset}/{name}.yaml", *settings, *stage_modules(name, ROOT)}
    found = {f"notebooks/{name}.ipynb": json.dumps(code).encode()}
    found |= {file: (ROOT / file).read_bytes() for file in sorted(files) if (ROOT / file).is_file()}
    return {file: hashlib.sha256(content).hexdigest() for file, content in found.items()}


def check_copy(name: str) -> None:
    """Refuse a notebook that is no longer what DVC takes it for, in a run that DVC started."""
    copy = ROOT / "outputs/.code" / f"{name}.ipynb"
    if "DVC_STAGE" in os.environ and copy.is_file():
        code = code_only(notebooks.read(notebooks.FOLDER / f"{name}.ipynb"))
        if json.loads(copy.read_text()) != code:
            raise NotebookError(f"notebooks/{name}.ipynb was changed since this pipeline began; "
                                "start `dvc repro` again")
