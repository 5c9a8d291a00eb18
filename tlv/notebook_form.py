"""The form in which a notebook is kept: one that git can compare, with the costs of its runs."""

import io
import re
from base64 import b64decode, b64encode

import nbformat
from PIL import Image

from tlv.code_copy import KERNEL
from tlv.costs import banner_table


def canonicalise(notebook, prefix: str) -> nbformat.NotebookNode:
    """Make an executed notebook depend on nothing but its code and results, in place.

    Drops timings, widget state and stderr (progress is for the person who watches), joins pieces
    of one stream, numbers cells `NN-01` and executions from 1.
    """
    notebook.metadata = nbformat.from_dict(KERNEL)
    notebook.nbformat_minor = 5
    count = 0
    for number, cell in enumerate(notebook.cells, 1):
        tags = cell.metadata.get("tags", [])
        cell["id"] = f"{prefix}-{number:02d}"
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
        cell.outputs = _joined(o for o in cell.outputs if o.get("name") != "stderr")
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if "metadata" in output:
                output.metadata = {}
            if "execution_count" in output:
                output.execution_count = cell.execution_count
    return notebook


def _joined(outputs) -> list:
    """How a stream is cut into messages is chance: join neighbours of one name."""
    joined = []
    for output in outputs:
        if joined and output.get("name") and output.get("name") == joined[-1].get("name"):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def shrink_figures(notebook) -> nbformat.NotebookNode:
    """Store figures in 256 colours, in place: half the bytes, no difference to the eye."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                figure, small = Image.open(io.BytesIO(b64decode(data["image/png"]))), io.BytesIO()
                figure.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
                data["image/png"] = b64encode(small.getvalue()).decode()
    return notebook


def fill_banner(notebook, name: str) -> None:
    """Put the recorded costs into the table of the first cell (the lines that start with `|`)."""
    text = notebook.cells[0].source
    table = banner_table(name)
    if re.search(r"^\|", text, flags=re.M):
        text = re.sub(r"^\|.*(\n\|.*)*", lambda _: table, text, count=1, flags=re.M)
    else:
        text = f"{text.rstrip()}\n\n{table}"
    notebook.cells[0].source = text


def drop_banner(notebook) -> None:
    """Take the costs out of the first cell: two equal runs must not differ by what others took."""
    text = re.sub(r"\n*^\|.*(\n\|.*)*", "", notebook.cells[0].source, count=1, flags=re.M)
    notebook.cells[0].source = text


def drop_measured(notebook) -> None:
    """Take away what cells tagged `measured` show: numbers and figures of another run.

    Times and memory differ from run to run. Of prose cells with that tag nothing is left.
    """
    kept = []
    for cell in notebook.cells:
        if "measured" in cell.metadata.get("tags", []):
            if cell.cell_type == "markdown":
                continue
            cell.outputs = []
        kept.append(cell)
    notebook.cells = kept
