"""Which `tlv` modules a stage depends on, found in the code: `python -m tlv.pipeline` rewrites the
lists in dvc.yaml, and a test holds them to it.
"""

import ast
import re
import sys
from pathlib import Path

from tlv import ROOT, notebooks
from tlv.files import write_text

# It makes stand-ins for missing inputs below outputs/scratch/, which no stage may read.
NOT_FOLLOWED = {"tlv.smoke"}


def modules_named(code: str, root: Path = ROOT) -> set[str]:
    """The modules of tlv that some code imports, or starts by name (`python -m tlv.train`)."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    pattern = re.compile(r"tlv(\.\w+)*")
    found = {m for m in found if pattern.fullmatch(m) and _file(m, root).exists()} - NOT_FOLLOWED
    return found | {m.rpartition(".")[0] for m in found if m.count(".") > 1}  # runs on import too


def _file(module: str, root: Path) -> Path:
    path = root / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules_needed(code: str, root: Path = ROOT) -> list[str]:
    """The files of all modules that some code needs, directly or through others, in order."""
    seen, waiting = set(), modules_named(code, root)
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting |= modules_named(_file(module, root).read_text(), root) - seen
    return sorted(str(_file(m, root).relative_to(root)) for m in seen)


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
