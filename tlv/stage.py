"""Run one notebook as a stage of the pipeline: `python -m tlv.stage run NN_name --preset tiny`.

It runs with params/tiny/NN_name.yaml, through Papermill, and leaves the executed copy in
outputs/tiny/NN_name/run.ipynb.
"""

import argparse
import logging
import os
import re
import resource
import shutil
import sys
import time

from tlv import ROOT, notebook_form, notebooks
from tlv.config import ConfigError, load_params
from tlv.costs import costs_path, record_cost
from tlv.notebook_parameters import (
    NotebookError,
    check_parameters,
    defaults_of,
    parameters,
)
from tlv.stage_inputs import check_copy, digests, files_of

# What makes a run a real one, so that no preset leaves it to the smoke run's default: its size ...
SCALE = re.compile(r"_steps$|^num_(train|val|test|texts|clips|samples|trials)$|"
                   r"^(grid_|long_)?lengths?$")
# ... how it trains, and its gates.
STATED = ("optimizer", "lr_connector", "save_every", "launch_config",
          "min_free", "min_choice", "min_margin", "min_score")  # fmt: skip
KEPT = ("finished/", "clips/")  # until the stage is done: `tlv.checkpoint`, `tlv.clip_facts`
START_ATTEMPTS = 2  # a kernel now and then fails to start on a busy machine


def load_stage_params(name: str, preset: str, notebook) -> dict:
    """params/<preset>/<name>.yaml, checked against the notebook's parameters cell, plus out_dir."""
    path = ROOT / "params" / preset / f"{name}.yaml"
    if not path.is_file():
        there = sorted(p.name for p in (ROOT / "params").iterdir() if p.is_dir())
        raise NotebookError(f"{path.relative_to(ROOT)}: no such file; presets: {', '.join(there)}")
    source, where = str(path.relative_to(ROOT)), f"notebooks/{name}.ipynb"
    values = load_params(path)
    if "out_dir" in values:
        raise NotebookError(f"{source}: remove `out_dir`; the stage sets outputs/{preset}/{name}")
    values["out_dir"] = f"outputs/{preset}/{name}"
    check_parameters(values, notebook, source, where)
    for key, (default, _) in parameters(notebook, where).items():
        is_scale = SCALE.search(key) and default is not None
        if (is_scale or key in STATED) and key not in values:
            raise NotebookError(
                f"{source}: `{key}` is missing; its default {default} in {where} is the smoke run's"
            )
        value = values.get(key, default)
        if isinstance(value, str) and value.startswith("outputs/scratch"):
            raise NotebookError(f"{source}: set `{key}`; its default {value} is the smoke run's")
    return values


def run(name: str, preset: str) -> None:
    """Run one notebook for real. Raises what the notebook raises; the executed copy stays.

    DVC looks at code and settings after a stage. So one that was edited meanwhile is an error:
    nobody could tell what the results are of.
    """
    source = notebooks.FOLDER / f"{name}.ipynb"
    notebook = notebooks.read(source)
    values = load_stage_params(name, preset, notebook)
    given = defaults_of(notebook) | values
    check_copy(name)
    before = digests(files_of(name, preset, given))
    # A run that stops leaves its steps there, a finished training or what it knew of its clips.
    unfinished = ROOT / "outputs/.resume" / preset / name
    resumed = any(any(unfinished.rglob(left)) for left in ("step-*[0-9]/", *KEPT))
    out_dir = ROOT / values["out_dir"]
    out_dir.mkdir(parents=True, exist_ok=True)
    num_threads = given.get("num_threads", 1)
    # Progress bars stay, for who watches, but redraw every 5 s: in a log each is a line.
    os.environ.update(notebooks.environment(num_threads) | {"TQDM_MININTERVAL": "5"})
    target, start = out_dir / "run.ipynb", time.monotonic()
    start_from = "goes on with what a run that stopped left" if resumed else "starts clean"
    print(f"{name}: running with params/{preset}/{name}.yaml, {num_threads} thread(s); "
          f"{start_from}", flush=True)  # fmt: skip
    try:
        _execute(source, target, values)
    finally:
        if target.exists():
            executed = notebook_form.canonicalise(notebooks.read(target), name[:2])
            notebook_form.drop_banner(executed)
            notebook_form.drop_measured(executed)
            notebooks.write(target, executed)
    seconds = time.monotonic() - start
    after = digests(before)
    if edited := sorted(file for file in before if before[file] != after[file]):
        raise NotebookError(f"{', '.join(edited)} was changed while {name} ran; run it again")
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest process
    if not resumed:  # else it would be the cost of the rest
        _record(preset, name, seconds, peak_kib)
    for kept in [folder for left in KEPT for folder in unfinished.rglob(left)]:
        shutil.rmtree(kept.parent)
    print(f"{name}: done in {seconds:.0f} s, largest process {peak_kib / 2**20:.2f} GiB")


def _record(preset, name, seconds, peak_kib) -> None:
    """Store what the run cost. A file in a merge, or a full disk, costs no finished run."""
    try:
        record_cost(preset, name, seconds, peak_kib)
    except (OSError, ValueError) as error:
        print(f"{name}: its cost is not recorded in {costs_path(preset)}: {error}", file=sys.stderr)


def _execute(source, target, values) -> None:
    import papermill
    import zmq
    from nbclient.exceptions import DeadKernelError

    # It calls parameters annotated `int | None` unknown; `check_parameters` has looked at them.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with notebooks.private_kernel() as manager:
                papermill.execute_notebook(
                    source, target, values, kernel_name="python3", km=manager, cwd=ROOT,
                    progress_bar=False, stdout_file=sys.stdout, stderr_file=sys.stderr,
                    extra_arguments=["--IPKernelApp.log_level=40"],
                )  # fmt: skip
            return
        except DeadKernelError:
            raise
        except (RuntimeError, zmq.ZMQError) as error:  # the kernel never answered
            if attempt == START_ATTEMPTS:
                raise
            print(f"the kernel did not start ({error}); trying again", file=sys.stderr)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tlv.stage", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    run_parser = actions.add_parser("run")
    run_parser.add_argument("name")
    run_parser.add_argument("--preset", required=True)
    options = parser.parse_args(arguments)
    try:
        run(options.name, options.preset)
    except (ConfigError, NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ not in ("PapermillExecutionError", "DeadKernelError"):
            raise
        print(f"error: {options.name} stopped: {error}", file=sys.stderr)
        print(f"error: {options.name} stopped: {_last_words(error, options)}", file=sys.stderr)
        return 1
    return 0


def _last_words(error, options) -> str:
    """What went wrong in one line. What a notebook calls its parameters is a file here."""
    said = str(getattr(error, "evalue", error)).strip()
    path = f"params/{options.preset}/{options.name}.yaml"
    if said.startswith("parameters: "):
        return said.replace("parameters", path, 1)
    return f"{said} (settings: {path})"


if __name__ == "__main__":
    sys.exit(main())
