"""What the notebooks' code may not do: look at the truth too early, import what it never uses."""

import ast
import json
import re

import pytest

from tlv import notebooks

SCORING = "Against the truth"  # the section of notebook 01 in which its filters are scored


def read_cells(name) -> list[tuple[str, str]]:
    """(cell type, source) in order."""
    cells = json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def unused_imports(sources) -> list[str]:
    """Names that one of the code cells imports and none uses."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(_python(source)))]
    found = (alias.asname or alias.name.split(".")[0] for node in nodes
             if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names)
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    return sorted(set(found) - used)


def _python(source) -> str:
    """A cell without IPython's own lines (%matplotlib, !ls)."""
    return "\n".join(line for line in source.split("\n") if not line.startswith(("%", "!")))


@pytest.mark.parametrize("name", notebooks.names())
def test_every_import_is_used(name):
    assert not unused_imports(source for kind, source in read_cells(name) if kind == "code")


def test_an_import_counts_as_used_in_another_cell_only():
    cells = ["import math\nfrom tlv import viz as v, world", "import os.path", "v.show(os.sep)"]
    assert unused_imports(cells) == ["math", "world"]


def test_notebook_01_looks_at_the_truth_in_its_scoring_section_first():
    (name,) = (name for name in notebooks.names() if name.startswith("01"))
    cells = read_cells(name)
    (start,) = (i for i, (kind, source) in enumerate(cells)
                if kind == "markdown" and re.search(rf"^## .*{SCORING}", source, re.M))
    told = [re.search(r"truth|defects", source, re.I) for kind, source in cells if kind == "code"]
    first = sum(kind == "code" for kind, _ in cells[:start])  # code cells before that section
    assert not any(told[:first]), "a code cell before the scoring section names the truth"
    assert told[first], "the scoring section opens the truth in its first cell"
