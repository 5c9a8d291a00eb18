"""Notebooks as files: their parameters, a canonical form that git can compare, their smoke run.

`python -m tlv.notebooks refresh [NN_name ...]` runs notebooks with their default parameters and
stores the outputs in place; `python -m tlv.notebooks lint` checks the style rules.
"""

import argparse
import ast
import contextlib
import io
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from PIL import Image

from tlv import ROOT
from tlv.code_copy import KERNEL
from tlv.costs import banner_table, record_cost
from tlv.files import write_text
from tlv.notebook_style import lint

COUNT = re.compile(r"^num_|_steps$|_size$|_layers$|^width$")  # parameters that are never negative
FOLDER = ROOT / "notebooks"
# What makes two runs on one machine equal: no clocks, no random hashes, no progress bars drawn by
# others, no network. Thread counts are added by the caller.
ENVIRONMENT = {
    "SOURCE_DATE_EPOCH": "0",
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    # And one for speed: memory in pages of 2 MiB, where the C library is glibc. Training takes 4%
    # less time; what is computed stays the same.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class NotebookError(ValueError):
    """A notebook or its parameters are not as they must be; says what would be right."""


def environment(num_threads: int) -> dict[str, str]:
    """The variables that a kernel needs to run the same way every time."""
    threads = {f"{name}_NUM_THREADS": str(num_threads) for name in ("OMP", "MKL", "OPENBLAS")}
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    return ENVIRONMENT | threads | ({} if has_gpu else {"DS_ACCELERATOR": "cpu"})


def names() -> list[str]:
    """`00_toy_world`, `01_data_filtering` ... in order."""
    return sorted(p.stem for p in FOLDER.glob("[0-9][0-9]_*.ipynb"))


def read(path) -> nbformat.NotebookNode:
    if not Path(path).is_file():
        raise NotebookError(f"{path}: no such notebook; there are {', '.join(names()) or 'none'}")
    return nbformat.read(path, as_version=4)


def write(path, notebook) -> None:
    write_text(path, nbformat.writes(notebook).rstrip("\n") + "\n")


# ---- parameters -----------------------------------------------------------------------------


def parameters(notebook, where="notebook") -> dict[str, tuple]:
    """name -> (default, allowed types), from the one cell tagged `parameters`: literals only."""
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise NotebookError(f"{where}: {len(cells)} cells are tagged `parameters`, must be one")
    found = {}
    for line in ast.parse(cells[0].source).body:
        try:
            default = ast.literal_eval(line.value)
            name = (line.target if isinstance(line, ast.AnnAssign) else line.targets[0]).id
        except (ValueError, AttributeError):
            text = ast.unparse(line)
            raise NotebookError(
                f"{where}: the parameters cell holds `{text}`; only `name = literal`"
            ) from None
        annotation = ast.unparse(line.annotation) if isinstance(line, ast.AnnAssign) else ""
        found[name] = default, _types(default, annotation)
    return found


def _types(default, annotation: str) -> tuple:
    """The types a value may have: those of the annotation, else that of the default."""
    known = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None),
             "list": list, "tuple": list, "dict": dict}  # fmt: skip
    words = [part.split("[")[0].strip() for part in annotation.split("|")] if annotation else []
    types = tuple(known[word] for word in words if word in known) or (type(default),)
    types = tuple(list if t is tuple else t for t in types)
    return types + ((int,) if float in types else ())


def check_parameters(values: dict, notebook, source: str, where: str) -> None:
    """Refuse unknown names and wrong types, naming the file `source`, the key and what is right."""
    known = parameters(notebook, where)
    for name, value in values.items():
        if name not in known:
            raise NotebookError(
                f"{source}: unknown parameter `{name}`; {where} has {', '.join(known)}"
            )
        default, types = known[name]
        if type(value) in types:
            if COUNT.search(name) and type(value) is int and value < 0:
                raise NotebookError(f"{source}: `{name}: {value}` must be at least 0")
            continue
        wanted = " or ".join(t.__name__ for t in types)
        raise NotebookError(
            f"{source}: `{name}: {value!r}` is {type(value).__name__}, must be {wanted} "
            f"(the default is {default!r})"
        )


# ---- canonical forms ------------------------------------------------------------------------


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


# ---- the smoke run --------------------------------------------------------------------------


@contextlib.contextmanager
def private_kernel():
    """A kernel manager over sockets in a temporary folder: no ports, so nothing to collide with.

    nbclient leaves a kernel that it was handed running, so it is stopped here.
    """
    folder = tempfile.mkdtemp(prefix="tlv-")
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
    try:
        yield manager
    finally:
        if manager.has_kernel:
            run_sync(manager.shutdown_kernel)(now=True)
        shutil.rmtree(folder, ignore_errors=True)


def refresh(name: str) -> None:
    """Run one notebook with its defaults, as Jupyter would, and store outputs and cost in it."""
    path = FOLDER / f"{name}.ipynb"
    notebook = read(path)
    os.environ.update(environment(num_threads=1) | {"TQDM_DISABLE": "1"})
    start = time.monotonic()
    with private_kernel() as manager:
        here = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(notebook, km=manager, resources=here).execute()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # KiB, the largest process
    record_cost("smoke", name, time.monotonic() - start, peak)
    fill_banner(notebook, name)
    write(path, shrink_figures(canonicalise(notebook, name[:2])))


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


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tlv.notebooks", description=__doc__)
    parser.add_argument("action", choices=["refresh", "lint"])
    parser.add_argument("names", nargs="*", help="such as 02_architecture; none: all of them")
    options = parser.parse_args(arguments)
    chosen = options.names or names()
    if options.action == "refresh" and len(chosen) == 1:
        refresh(chosen[0])
    elif options.action == "refresh":
        for name in chosen:  # one process each, so that each one's memory is measured alone
            print(f"{name}: running at smoke scale ...", flush=True)
            subprocess.run([sys.executable, "-m", "tlv.notebooks", "refresh", name], check=True)
    problems = [f"{name}: {text}" for name in chosen for text in lint(FOLDER / f"{name}.ipynb")]
    print("\n".join(problems) or f"{', '.join(chosen)}: style is right")
    return bool(problems) and options.action == "lint"


if __name__ == "__main__":
    sys.exit(main())
