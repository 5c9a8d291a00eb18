"""Notebooks as files, and their smoke run.

`python -m tlv.notebooks refresh [NN_name ...]` runs notebooks with their default parameters and
stores the outputs in place; `python -m tlv.notebooks lint` checks the style rules.
"""

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

from tlv import ROOT
from tlv.costs import record_cost
from tlv.files import write_text
from tlv.notebook_form import canonicalise, fill_banner, shrink_figures
from tlv.notebook_parameters import NotebookError
from tlv.notebook_style import lint

FOLDER = ROOT / "notebooks"
MAX_SOCKET = 80  # characters of a folder for sockets, whose paths may have 107
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


def environment(num_threads: int) -> dict[str, str]:
    """The variables that a kernel needs to run the same way every time."""
    threads = {f"{name}_NUM_THREADS": str(num_threads) for name in ("OMP", "MKL", "OPENBLAS")}
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    users = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = dict.fromkeys([str(ROOT), *users])  # first this checkout's tlv, whatever is installed
    own = {"PYTHONPATH": os.pathsep.join(paths)}
    return ENVIRONMENT | threads | own | ({} if has_gpu else {"DS_ACCELERATOR": "cpu"})


def names() -> list[str]:
    """`00_toy_world`, `01_data_filtering` ... in order."""
    return sorted(p.stem for p in FOLDER.glob("[0-9][0-9]_*.ipynb"))


def read(path) -> nbformat.NotebookNode:
    if not Path(path).is_file():
        raise NotebookError(f"{path}: no such notebook; there are {', '.join(names()) or 'none'}")
    return nbformat.read(path, as_version=4)


def write(path, notebook) -> None:
    write_text(path, nbformat.writes(notebook).rstrip("\n") + "\n")


@contextlib.contextmanager
def private_kernel():
    """A kernel manager over sockets in a temporary folder: no ports, so nothing to collide with.

    nbclient leaves a kernel that it was handed running, so it is stopped here.
    """
    folder = tempfile.mkdtemp(prefix="tlv-")
    if len(folder) > MAX_SOCKET:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="tlv-", dir="/tmp")
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


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tlv.notebooks", description=__doc__)
    parser.add_argument("action", choices=["refresh", "lint"])
    parser.add_argument("names", nargs="*", help="such as 02_architecture; none: all of them")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names()):
        parser.error(f"no notebook {min(unknown)!r}; there are {', '.join(names())}")
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
