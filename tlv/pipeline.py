"""Which `tlv` modules a stage depends on, found in the code: `python -m tlv.pipeline` rewrites the
lists in dvc.yaml, and a test holds them to it.
"""

import re
import sys
from pathlib import Path

from tlv import ROOT, notebooks
from tlv.files import write_text
from tlv.imports import modules_needed


def stage_modules(name: str, root: Path = ROOT) -> list[str]:
    """What dvc.yaml must list below the stage `name`."""
    notebook = notebooks.read(root / "notebooks" / f"{name}.ipynb")
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    return modules_needed(code, root)


def rewrite(text: str, name: str, modules: list[str]) -> str:
    """dvc.yaml's text with the `tlv/` lines of one stage replaced, all else kept."""
    head, found, body = text.partition(f"\n  {name}:\n")
    if not found:
        raise ValueError(f"dvc.yaml has no stage {name}; write it first, with one `- tlv/` line")
    lines = "".join(f"      - {module}\n" for module in modules)
    body = re.sub(r"(      - tlv/\S+\n)+", lines, body, count=1)
    return head + found + body


def main() -> int:
    path = ROOT / "dvc.yaml"
    text = before = path.read_text()
    for name in notebooks.names():
        for stage in (name, f"image_{name}"):
            if f"\n  {stage}:\n" in text:
                text = rewrite(text, stage, stage_modules(name))
    write_text(path, text)
    print("dvc.yaml: " + ("no change" if text == before else "module lists rewritten"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
