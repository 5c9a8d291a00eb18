"""The pipeline's joints: what reruns when, what a fresh clone can pull, what the lock promises.

Here stand-in notebooks write every declared output in a moment; dvc.yaml is the real one. The real
notebooks are run in test_smoke_pipeline.py.
"""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml
from clone import (
    IMAGE,
    NAMES,
    commit,
    environment,
    make_clone,
    own_folder,
    repro,
    run,
    stages,
    use_preset,
)

from tlv import ROOT, code_copy, notebooks, pipeline
from tlv.imports import modules_needed
from tlv.notebook_parameters import defaults_of

pytestmark = pytest.mark.slow
CODE = [f"code@{name}" for name in NAMES]

STAND_IN = """
import hashlib
from tlv import ROOT
from tlv.files import write_json, write_text
files = [f for p in inputs for f in sorted((ROOT / p).rglob("*")) or [ROOT / p]]
digest = hashlib.md5(repr([seed] + [f.read_bytes() for f in files if f.is_file()]).encode())
print("from", len(files), "files:", digest.hexdigest())
for name in outputs:
    path = ROOT / out_dir / name
    if path.suffix == ".csv":
        write_text(path, "step,loss\\n1,2.0\\n2,1.5\\n")
    elif path.suffix:
        write_json(path, {"value": int(digest.hexdigest()[:6], 16), "seed": seed})
    else:
        write_json(path / "part.json", {"digest": digest.hexdigest()})
"""


def paths(items) -> list[str]:
    """The paths in a list of dvc.yaml, with or without options."""
    return [item if isinstance(item, str) else next(iter(item)) for item in items]


def upstream(stage: dict) -> list[str]:
    return [d.replace("${preset}", "smoke") for d in stage["deps"] if "${preset}" in d]


def stand_in(name, stage) -> nbformat.NotebookNode:
    own = f"outputs/${{preset}}/{name}/"
    written = [p for key in ("outs", "metrics", "plots") for p in paths(stage.get(key, []))]
    written = [p.removeprefix(own) for p in written if not p.endswith("run.ipynb")]
    cells = [
        nbformat.v4.new_markdown_cell("A stand-in."),
        nbformat.v4.new_code_cell(
            f'seed = 0\nout_dir = "outputs/scratch/{name}"\n'
            f"inputs = {upstream(stage)}\nrate = 1.0e-3",
            metadata={"tags": ["parameters"]},
        ),
        nbformat.v4.new_code_cell(f"outputs = {written}" + STAND_IN),
    ]
    return nbformat.v4.new_notebook(cells=cells, metadata=code_copy.KERNEL)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A clone with stand-in notebooks, run once and committed. Tests leave it as they found it."""
    folder = make_clone(tmp_path_factory.mktemp("project") / "clone")
    shutil.rmtree(folder / "outputs", ignore_errors=True)
    (folder / "dvc.lock").unlink(missing_ok=True)
    listed = stages(folder)
    for name in NAMES:
        notebooks.write(folder / "notebooks" / f"{name}.ipynb", stand_in(name, listed[name]))
    run([sys.executable, "-m", "tlv.pipeline"], folder)
    params = {name: {"seed": 0} for name in NAMES}
    for stage in IMAGE:
        params[own_folder(stage)] = {"seed": 0, "inputs": upstream(listed[stage])}
    use_preset(folder, "smoke", params)
    assert sorted(repro(folder)) == sorted(NAMES + IMAGE + CODE)
    commit(folder)
    return folder


def edit(path, old, new) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_second_run_does_nothing(project):
    assert repro(project) == []
    assert run(["git", "status", "--porcelain"], project) == ""


def test_a_parameter_reruns_only_what_depends_on_it(project):
    path = project / "params/smoke/04_sft.yaml"
    edit(path, "seed: 0", "seed: 1")
    assert repro(project) == ["04_sft", "05_evaluation"]
    edit(path, "seed: 1", "seed: 0")
    assert repro(project) == []  # both results are in the run cache
    run(["git", "diff", "--exit-code", "dvc.lock"], project)
    run(["git", "checkout", "-q", "."], project)


def test_prose_and_saved_outputs_rerun_no_stage(project):
    path = project / "notebooks/01_data_filtering.ipynb"
    notebook = notebooks.read(path)
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell("More prose, so all ids move."))
    notebook.cells[-1].execution_count = 7
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="ran by hand")]
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.0"}
    notebooks.write(path, notebook)
    assert repro(project) == ["code@01_data_filtering"]
    run(["git", "checkout", "-q", "."], project)
    repro(project)


def test_changed_code_reruns_its_stage(project):
    path = project / "notebooks/05_evaluation.ipynb"
    edit(path, "import hashlib", "import hashlib  # changed")
    assert sorted(repro(project)) == ["05_evaluation", "code@05_evaluation", "image_05_evaluation"]
    run(["git", "checkout", "-q", "."], project)
    repro(project)


def test_a_forced_rerun_writes_the_same_bytes(project):
    assert repro(project, "--force", "--single-item", "02_architecture") == ["02_architecture"]
    run(["git", "diff", "--exit-code", "dvc.lock", "outputs/smoke/02_architecture"], project)
    run(["git", "checkout", "-q", "."], project)


def test_metrics_plots_and_experiments(project):
    shown = json.loads(run(["dvc", "metrics", "show", "--json"], project))
    assert len(shown[""]["data"]) == len(NAMES + IMAGE)
    assert "loss.csv" in run(["dvc", "plots", "show", "--json"], project)
    path = "params/smoke/05_evaluation.yaml"
    changes = ["-S", f"{path}:seed=3", "-S", f"{path}:+rate=1.0e-5"]  # which DVC writes as 1e-05
    done = run(["dvc", "exp", "run", "-n", "three", *changes], project)
    assert "Running stage '05_evaluation'" in done and "Running stage '04_sft'" not in done
    metrics = project / "outputs/smoke/05_evaluation/metrics.json"
    assert json.loads(metrics.read_text())["seed"] == 3
    run(["git", "checkout", "-q", "."], project)
    repro(project)


def test_one_command_changes_the_preset(project):
    shutil.copytree(project / "params/smoke", project / "params/other")
    for path in (project / "params/other").rglob("*.yaml"):
        path.write_text(path.read_text().replace("outputs/smoke", "outputs/other"))
    change = ["-n", "other", "-S", "params/preset.yaml:preset=other"]
    run(["dvc", "exp", "run", *change, "image_02_architecture", "01_data_filtering"], project)
    written = {str(p.parent) for p in (project / "outputs/other").rglob("metrics.json")}
    names = ("00_toy_world", "01_data_filtering", "image/02_architecture")
    assert written == {str(project / "outputs/other" / name) for name in names}
    run(["git", "checkout", "-q", "."], project)
    run(["git", "clean", "-fdqx", "params/other", "outputs/other"], project)
    assert repro(project) == []


def test_a_fresh_clone_pulls_and_has_nothing_to_run(project, tmp_path):
    store = tmp_path / "a store"
    run(["make", "-o", "venv", "remote", f"DIR={store}"], project)
    run(["dvc", "push"], project)
    assert any(store.rglob("*"))
    assert run(["git", "status", "--porcelain"], project) == ""  # the remote is this machine's
    fresh = tmp_path / "fresh"
    run(["git", "clone", "-q", str(project), str(fresh)], tmp_path)
    assert repro(fresh, "--allow-missing", "--dry") == []
    edit(fresh / "params/smoke/03_pretraining.yaml", "seed: 0", "seed: 5")
    with pytest.raises(AssertionError, match="03_pretraining"):  # it would run, without its input
        repro(fresh, "--allow-missing", "--dry")
    run(["git", "checkout", "-q", "."], fresh)
    run(["make", "-o", "venv", "remote", f"DIR={store}"], fresh)
    run(["dvc", "pull"], fresh)
    assert (fresh / "outputs/smoke/04_sft/checkpoint/part.json").is_file()
    assert set(repro(fresh)) <= set(CODE)  # the code copies are made, not stored


def test_a_preset_that_is_none_is_named_with_those_there_are(project):
    edit(project / "params/preset.yaml", "preset: smoke", "preset: huge")
    done = subprocess.run(["dvc", "repro"], cwd=project, env=environment(project), text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)  # fmt: skip
    assert done.returncode and (
        "error: params/preset.yaml: preset = 'huge' is no folder of params/; take one of gpu, own, "
        "paper, smoke, tiny\n") in done.stderr  # fmt: skip
    run(["git", "checkout", "-q", "."], project)


def test_a_bad_parameter_stops_the_pipeline_with_one_message(project):
    path = project / "params/smoke/00_toy_world.yaml"
    path.write_text("seed: 0\nrate: 1e-4\n")
    done = subprocess.run(
        [sys.executable, "-m", "tlv.stage", "run", "00_toy_world", "--preset", "smoke"],
        cwd=project, text=True, capture_output=True)  # fmt: skip
    assert done.returncode == 2
    message = "00_toy_world.yaml: rate = 1e-4 is a string in YAML 1.1; write 1.0e-4\n"
    assert done.stderr.startswith("error: ") and done.stderr.endswith(message)
    run(["git", "checkout", "-q", "."], project)


# ---- dvc.yaml against the code --------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES + IMAGE)
def test_stage_lists_the_modules_that_its_code_needs(name):
    listed = [d for d in stages()[name]["deps"] if d.startswith("tlv/")]
    needed = pipeline.stage_modules(name.removeprefix("image_"))
    assert listed == needed, "run `python -m tlv.pipeline`, which writes:\n" + "\n".join(needed)


@pytest.mark.parametrize("preset", ["tiny", "gpu", "paper", "own"])
@pytest.mark.parametrize("name", NAMES + IMAGE)
def test_files_named_in_params_are_dependencies(name, preset):
    path = ROOT / "params" / preset / f"{own_folder(name)}.yaml"
    stage = stages()[name]
    known = [p.replace("${preset}", preset) for p in stage["deps"] + paths(stage["params"])]
    for value in (yaml.safe_load(path.read_text()) or {}).values():
        in_repository = isinstance(value, str) and value.startswith(("params/", "outputs/", "tlv/"))
        covered = any(f"{value}/".startswith(f"{p}/") or p.startswith(f"{value}/") for p in known)
        assert not in_repository or covered, f"{path}: `{value}` is no dependency of {name}"


def test_any_of_the_zero_files_may_be_named():
    files = {f"params/{path.name}" for path in (ROOT / "params").glob("deepspeed_zero*.json")}
    for name, stage in stages().items():
        listed = files & set(stage["deps"])
        assert not listed or listed == files, f"{name} depends on some of {sorted(files)} alone"


def test_every_notebook_has_its_stages():
    listed = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["code"]["foreach"]
    assert listed == NAMES
    assert set(notebooks.names()) <= set(NAMES)


def test_modules_are_followed_through_imports_and_names(tmp_path):
    (tmp_path / "tlv").mkdir()
    files = {"__init__": "", "a": "from tlv import b", "b": "import tlv.c", "c": "",
             "launch": "command = ['-m', 'tlv.train']", "train": "def f():\n import tlv.c as x",
             "smoke": "from tlv import unused", "unused": ""}  # fmt: skip
    for name, code in files.items():
        (tmp_path / "tlv" / f"{name}.py").write_text(code)
    needed = modules_needed("from tlv.a import f\nfrom tlv import launch, smoke", tmp_path)
    assert needed == [f"tlv/{n}.py" for n in ["__init__", "a", "b", "c", "launch", "train"]]


def test_gates_are_never_the_smoke_runs_where_a_toy_world_is_evaluated():
    """A run that learnt nothing must not pass: what opens the smoke run's gates is no default."""
    for path in sorted((ROOT / "params").glob("*/00_toy_world.yaml")):
        if yaml.safe_load(path.read_text())["data_card"]:
            continue
        for name in ("01_data_filtering", "05_evaluation", "image/05_evaluation", "06_long_video"):
            known = defaults_of(notebooks.read(ROOT / f"notebooks/{name.split('/')[-1]}.ipynb"))
            wanted = "min_(score|free|choice|margin|hit_rate)|max_growth"
            gates = {key for key in known if re.fullmatch(wanted, key)}
            given = yaml.safe_load((path.parent / f"{name}.yaml").read_text())
            assert gates <= set(given), f"{path.parent.name}/{name}"


def test_committed_lock_belongs_to_the_committed_code(tmp_path):
    folder = tmp_path / "clone"
    run(["git", "clone", "-q", str(ROOT), str(folder)], tmp_path)
    for name in NAMES:  # they are in no cache
        run([sys.executable, "-m", "tlv.code_copy", name], folder)
    stale = repro(folder, "--allow-missing", "--dry")
    assert stale == [], "run `make repro` and commit its results"
    run(["git", "diff", "--exit-code"], folder)
