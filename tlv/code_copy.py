"""A notebook's code cells alone, on which its stage depends: `python -m tlv.code_copy NN_name`.

Prose, outputs and ids (which count the prose cells too) leave no trace in outputs/.code/, so that
editing prose or saving outputs reruns nothing.
"""

import json
import sys

from tlv import ROOT
from tlv.config import ConfigError, load_params
from tlv.files import write_text

KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def code_only(notebook: dict) -> dict:
    """A notebook as JSON holds it -> the same with code cells alone, without outputs."""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            tags = [t for t in cell["metadata"].get("tags", []) if t == "parameters"]
            cells.append({
                "cell_type": "code", "execution_count": None, "id": f"code-{len(cells) + 1:02d}",
                "metadata": {"tags": tags} if tags else {}, "outputs": [],
                "source": "".join(cell["source"]).splitlines(keepends=True),
            })  # fmt: skip
    return {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}


def _wrong_preset() -> str:
    """What is wrong with params/preset.yaml, or "". The first stages say it: DVC would only miss a
    file that its reader never heard of."""
    try:
        preset = load_params(ROOT / "params/preset.yaml").get("preset")
    except ConfigError as error:
        return str(error)
    there = sorted(path.name for path in (ROOT / "params").iterdir() if path.is_dir())
    return "" if preset in there else (
        f"params/preset.yaml: preset = {preset!r} is no folder of params/; take one of "
        f"{', '.join(there)}")  # fmt: skip


def main(arguments: list[str]) -> int:
    (name,) = arguments
    source = ROOT / "notebooks" / f"{name}.ipynb"
    if not source.is_file():
        print(f"error: {source.relative_to(ROOT)}: no such notebook", file=sys.stderr)
        return 2
    if wrong := _wrong_preset():
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    # Plain JSON: a start of nbformat would take a second, seven times.
    code = code_only(json.loads(source.read_text()))
    text = json.dumps(code, indent=1, ensure_ascii=False)
    write_text(ROOT / "outputs" / ".code" / f"{name}.ipynb", text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
