"""Which modules of `tlv` some code needs, read from the code and without running it."""

import ast
import re
from pathlib import Path

from tlv import ROOT

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
