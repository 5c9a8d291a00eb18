"""Parameters are checked before anything runs; the executed copy holds code and results alone."""

import json
import os
import tempfile

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tlv import ROOT, code_copy, costs, notebook_form, notebooks, stage, stage_inputs
from tlv.code_copy import code_only
from tlv.notebook_parameters import NotebookError, parameters

PARAMETERS = """\
seed = 0  # any whole number
out_dir = "outputs/scratch/00_x"  # where results go
rate: float = 1.0e-3  # per step
limit: float | None = None  # None: no clipping
parts = ("connector",)  # what is trained
is_fast = True
num_threads = 1
"""


def notebook(body="print(seed)", parameters=PARAMETERS):
    cells = [new_markdown_cell("# 00 · X"),
             new_code_cell(parameters, metadata={"tags": ["parameters"]}),
             new_code_cell(body)]  # fmt: skip
    return new_notebook(cells=cells, metadata=code_copy.KERNEL)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty project: everything that the stage reads or writes is below it."""
    before = dict(os.environ)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params" / "tiny").mkdir(parents=True)
    for module in (notebooks, stage, stage_inputs, costs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path / "notebooks")
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def write(root, body="print(seed)", params="seed: 3\n"):
    notebooks.write(root / "notebooks" / "00_x.ipynb", notebook(body))
    (root / "params/tiny/00_x.yaml").write_text(params)


# ---- parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("text, message", [
    ("sed: 1", "unknown parameter `sed`; notebooks/00_x.ipynb has seed, out_dir, rate"),
    ("rate: 1e-4", "rate = 1e-4 is a string in YAML 1.1; write 1.0e-4"),
    ("rate: fast", "`rate: 'fast'` is str, must be float or int"),
    ("seed: 1.5", "`seed: 1.5` is float, must be int .the default is 0."),
    ("seed: true", "is bool, must be int"),
    ("is_fast: 1", "is int, must be bool"),
    ("parts: llm", "is str, must be list"),
    ("limit: none", "must be float or NoneType or int"),
    ("num_threads: -1", "`num_threads: -1` must be more than 0"),
    ("num_threads: 0", "`num_threads: 0` must be more than 0"),
    ("seed: -1", "`seed: -1` must be at least 0"),
    ("parts: [connector, 1]", "must be a list as .* is"),
    ("parts: []", "must be a list as .* is"),
    ("out_dir: here", "remove `out_dir`; the stage sets outputs/tiny/00_x"),
    ("- seed", "must be a mapping"),
    ("a: b: c", "not valid YAML"),
])  # fmt: skip
def test_wrong_parameter_is_named_with_its_file(root, text, message):
    write(root, params=text)
    with pytest.raises(ValueError, match=f"params/tiny/00_x.yaml: .*{message}"):
        stage.load_stage_params("00_x", "tiny", notebook())


def test_a_missing_parameter_that_makes_a_run_a_real_one_is_named(root):
    write(root, params="seed: 3\n")
    own = notebook(parameters=PARAMETERS + "num_steps = 3\nnum_epochs: int | None = None\n")
    with pytest.raises(NotebookError, match="00_x.yaml: `num_steps` is missing; its default 3"):
        stage.load_stage_params("00_x", "tiny", own)


@pytest.mark.parametrize("line", ["min_free = 0.0", "optimizer = 'adamw'", "save_every = None"])
def test_a_missing_gate_or_way_to_train_is_named_too(root, line):
    write(root, params="seed: 3\n")
    own, name = notebook(parameters=PARAMETERS + line + "\n"), line.split()[0]
    with pytest.raises(NotebookError, match=f"00_x.yaml: `{name}` is missing; its default "):
        stage.load_stage_params("00_x", "tiny", own)


def test_a_run_says_whether_it_goes_on_or_starts_clean(root, monkeypatch, capsys):
    write(root)
    monkeypatch.setattr(stage, "_execute", lambda *_: None)
    stage.run("00_x", "tiny")
    assert "1 thread(s); starts clean\n" in capsys.readouterr().out
    (root / "outputs/.resume/tiny/00_x/0123456789abcdef/clips").mkdir(parents=True)
    stage.run("00_x", "tiny")
    assert "goes on with what a run that stopped left\n" in capsys.readouterr().out


def test_right_parameters_pass(root):
    write(root, params="rate: 1\nlimit: 1.0\nparts: [connector, llm]\nis_fast: false\n")
    values = stage.load_stage_params("00_x", "tiny", notebook())
    assert values == {"rate": 1, "limit": 1.0, "parts": ["connector", "llm"], "is_fast": False,
                      "out_dir": "outputs/tiny/00_x"}  # fmt: skip
    write(root, params="# all defaults\n")
    assert stage.load_stage_params("00_x", "tiny", notebook()) == {"out_dir": "outputs/tiny/00_x"}


def test_a_stage_never_reads_what_the_smoke_run_left(root):
    write(root)
    source = notebook(parameters=PARAMETERS + 'world_dir = "outputs/scratch/00_toy_world"  # in')
    with pytest.raises(NotebookError, match="params/tiny/00_x.yaml: set `world_dir`; its default"):
        stage.load_stage_params("00_x", "tiny", source)


def test_missing_files_and_cells_are_named(root, capsys):
    with pytest.raises(NotebookError, match="params/gpu/00_x.yaml: no such file; presets: tiny"):
        stage.load_stage_params("00_x", "gpu", notebook())
    with pytest.raises(NotebookError, match="99_y.ipynb: no such notebook"):
        notebooks.read(notebooks.FOLDER / "99_y.ipynb")
    assert code_copy.main(["99_y"]) == 2
    assert "error: notebooks/99_y.ipynb: no such notebook" in capsys.readouterr().err
    with pytest.raises(NotebookError, match="0 cells are tagged"):
        parameters(new_notebook(cells=[new_code_cell("seed = 0")]))
    with pytest.raises(NotebookError, match="`width = 2 [*] 3`; only `name = literal`"):
        parameters(notebook(parameters="width = 2 * 3"))


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("**/[0-9][0-9]_*.yaml")), ids=str)
def test_committed_params_fit_their_notebook_in_both_yaml_readers(path):
    from ruamel.yaml import YAML

    values = yaml.safe_load(path.read_text()) or {}
    assert json.dumps(values) == json.dumps(YAML(typ="safe").load(path.read_text()) or {}), (
        f"{path}: Papermill and DVC read it differently"
    )
    source = notebooks.read(notebooks.FOLDER / f"{path.stem}.ipynb")
    stage.load_stage_params(path.stem, str(path.parent.relative_to(ROOT / "params")), source)


# ---- canonical forms ------------------------------------------------------------------------


def test_code_copy_ignores_prose_outputs_and_ids():
    plain, busy = notebook(), notebook()
    busy.cells.insert(0, new_markdown_cell("prose"))
    busy.cells[-1].outputs = [new_output("stream", text="3")]
    busy.cells[-1].execution_count = 9
    busy.cells[-1].metadata = nbformat.from_dict({"tags": ["nbval-check-output"], "x": 1})
    busy.metadata["language_info"] = {"name": "python"}
    one, two = (code_only(n) for n in (plain, busy))
    assert one == two
    busy.cells[-1].source += "  # changed"
    assert code_only(busy) != one
    copy = nbformat.reads(json.dumps(one), 4)  # which also looks whether it is a notebook
    assert parameters(copy) == parameters(plain)


def test_canonical_copy_forgets_time_chance_and_progress():
    copies = []
    for seconds, cut in (("1.5", 1), ("2.5", 3)):
        n = notebook("print('abcd')")
        n.metadata["papermill"] = {"duration": seconds}
        n.cells[2].metadata = nbformat.from_dict({"execution": {"started": seconds}})
        n.cells[2].execution_count = 7 + cut
        text = "abcd\n"
        n.cells[2].outputs = [
            new_output("stream", name="stderr", text=f" 10%| {seconds} s"),
            new_output("stream", name="stdout", text=text[:cut]),
            new_output("stream", name="stdout", text=text[cut:]),
            new_output("execute_result", data={"text/plain": "1"}, execution_count=7 + cut),
        ]
        copies.append(nbformat.writes(notebook_form.canonicalise(n, "00")))
    assert copies[0] == copies[1]
    result = nbformat.reads(copies[0], as_version=4)
    assert [c.id for c in result.cells] == ["00-01", "00-02", "00-03"]
    assert result.cells[2].execution_count == 1 == result.cells[2].outputs[1].execution_count
    assert result.cells[2].outputs[0].text == "abcd\n"


# ---- running --------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_makes_a_reproducible_copy_and_records_its_cost(root, capfd):
    body = f"""
import os, sys
print("seed", seed, os.getcwd() == {str(root)!r})
print(os.environ["OMP_NUM_THREADS"], "threads")
print("progress " * 2, file=sys.stderr)
block = bytearray(200_000_000)
"""
    write(root, body, params="seed: 3\nnum_threads: 2\n")
    copies = []
    for _ in range(2):
        stage.run("00_x", "tiny")
        copies.append((root / "outputs/tiny/00_x/run.ipynb").read_bytes())
    assert copies[0] == copies[1]
    (output,) = nbformat.reads(copies[0].decode(), as_version=4).cells[-1].outputs
    assert output.text == "seed 3 True\n2 threads\n"
    shown = capfd.readouterr()  # it streams to the terminal, progress too
    assert "seed 3 True" in shown.out and "progress progress" in shown.err
    ((where, cost),) = costs.read_costs("tiny")["00_x"].items()
    assert " cores of " in where
    assert cost["peak_mib"] > 200 and cost["wall_s"] > 0 and cost["date"]


@pytest.mark.slow
def test_failing_notebook_leaves_its_copy_and_one_message(root, capfd):
    write(root, "print('before')\nraise ValueError('the clip is upside down')")
    assert stage.main(["run", "00_x", "--preset", "tiny"]) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last == ("error: 00_x stopped: the clip is upside down "
                    "(settings: params/tiny/00_x.yaml)")
    copy = (root / "outputs/tiny/00_x/run.ipynb").read_text()
    assert "the clip is upside down" in copy and '"papermill"' not in copy
    assert costs.read_costs("tiny") == {}


@pytest.mark.slow
def test_a_wrong_value_ends_in_one_line_with_its_file(root, capfd):
    write(root, "from tlv.config import ConfigError\n"
                "raise ConfigError('parameters: precision = \"fp17\" must be one of fp32, bf16')")
    assert stage.main(["run", "00_x", "--preset", "tiny"]) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last == ("error: 00_x stopped: params/tiny/00_x.yaml: precision = \"fp17\" must be one "
                    "of fp32, bf16")


@pytest.mark.slow
def test_killed_kernel_is_a_failure(root, capfd):
    write(root, "import os\nos._exit(9)")
    assert stage.main(["run", "00_x", "--preset", "tiny"]) == 1
    assert "00_x stopped" in capfd.readouterr().err


@pytest.mark.slow
def test_kernel_that_does_not_start_is_tried_once_more(root, monkeypatch, capfd):
    import papermill

    write(root)
    real, calls = papermill.execute_notebook, []

    def flaky(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return real(*arguments, **options)

    monkeypatch.setattr(papermill, "execute_notebook", flaky)
    stage.run("00_x", "tiny")
    assert len(calls) == 2 and "trying again" in capfd.readouterr().err


def test_what_was_measured_is_left_out_of_the_executed_copy():
    def cell(tags):
        output = new_output("stream", text="3.1 s")
        return new_code_cell("x", outputs=[output], metadata={"tags": tags})

    figure = new_markdown_cell("![a](b.png)", metadata={"tags": ["measured"]})
    prose = new_markdown_cell("Look for: c.")
    notebook = new_notebook(cells=[cell(["measured"]), figure, prose, cell([])])
    notebook_form.drop_measured(notebook)
    assert [c.cell_type for c in notebook.cells] == ["code", "markdown", "code"]
    assert [len(c.outputs) for c in notebook.cells if c.cell_type == "code"] == [0, 1]


# ---- what results are of --------------------------------------------------------------------


@pytest.mark.parametrize("name, text", [
    ("params/tiny/00_x.yaml", "seed: 4\n"), ("tlv/a.py", "x = 2\n"),
    ("notebooks/00_x.ipynb", None), ("params/launch.yaml", "num_ranks: 2\n"),
])  # fmt: skip
def test_what_is_edited_while_a_stage_runs_is_no_longer_what_it_ran(root, monkeypatch, name, text):
    """DVC looks at files after a stage, and would take the new ones for what its results are of."""
    (root / "tlv").mkdir()
    for file, content in (("tlv/__init__.py", ""), ("tlv/a.py", "x = 1\n"),
                          ("params/launch.yaml", "num_ranks: 1\n")):  # fmt: skip
        (root / file).write_text(content)
    own = notebook("import tlv.a", PARAMETERS + "launch: str | None = None\n")
    notebooks.write(root / "notebooks/00_x.ipynb", own)
    (root / "params/tiny/00_x.yaml").write_text("seed: 3\nlaunch: params/launch.yaml\n")

    def edit(*_):
        if text is None:
            write_notebook(root, "import tlv.a; print(2)")
        elif text:
            (root / name).write_text(text)

    def write_notebook(root, body):
        notebooks.write(root / "notebooks/00_x.ipynb", notebook(body, own.cells[1].source))

    monkeypatch.setattr(stage, "_execute", edit)
    with pytest.raises(NotebookError, match=f"{name} was changed while 00_x ran; run it again"):
        stage.run("00_x", "tiny")
    monkeypatch.setattr(stage, "_execute", lambda *_: None)
    stage.run("00_x", "tiny")


@pytest.mark.parametrize("file, text, is_edited", [
    ("params/tiny/00_x.yaml", "seed: 3  # why\n", False),  # DVC, too, compares values
    ("notebooks/00_x.ipynb", '{"cells": [', True),  # in the middle of a save
])  # fmt: skip
def test_values_count_and_a_torn_file_is_an_edited_one(root, monkeypatch, file, text, is_edited):
    write(root)
    (root / "params/tiny/00_x.yaml").write_text("seed: 3\n")
    monkeypatch.setattr(stage, "_execute", lambda *_: (root / file).write_text(text))
    if is_edited:
        with pytest.raises(NotebookError, match=f"{file} was changed while 00_x ran"):
            stage.run("00_x", "tiny")
    else:
        stage.run("00_x", "tiny")


def test_a_notebook_that_is_no_plain_python_is_named_before_it_runs(root):
    write(root, "%%time\nprint(seed)")
    with pytest.raises(NotebookError, match="notebooks/00_x.ipynb, or a module .* %%time"):
        stage.run("00_x", "tiny")


def test_a_notebook_edited_since_the_pipeline_began_is_not_run(root, monkeypatch):
    write(root)
    copy = root / "outputs/.code/00_x.ipynb"
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps(code_only(notebook())))
    monkeypatch.setattr(stage, "_execute", lambda *_: None)
    monkeypatch.setenv("DVC_STAGE", "00_x")
    stage.run("00_x", "tiny")
    write(root, "print(seed + 1)")
    with pytest.raises(NotebookError, match="00_x.ipynb was changed since this pipeline began"):
        stage.run("00_x", "tiny")
    monkeypatch.delenv("DVC_STAGE")
    stage.run("00_x", "tiny")  # by hand, whatever the copy is


def test_costs_that_cannot_be_written_cost_no_finished_run(root, monkeypatch, capsys):
    write(root)
    (root / "outputs/tiny").mkdir(parents=True)
    (root / "outputs/tiny/costs.json").write_text("<<<<<<< HEAD\n")
    monkeypatch.setattr(stage, "_execute", lambda *_: None)
    stage.run("00_x", "tiny")
    assert "00_x: its cost is not recorded in" in capsys.readouterr().err
    assert (root / "outputs/tiny/costs.json").read_text() == "<<<<<<< HEAD\n"


def test_the_rest_of_a_run_that_was_killed_is_not_recorded_as_its_cost(root, monkeypatch):
    write(root)
    monkeypatch.setattr(stage, "_execute", lambda *_: None)
    (root / "outputs/.resume/tiny/00_x/models/learned/0123456789abcdef/step-5").mkdir(parents=True)
    stage.run("00_x", "tiny")
    assert costs.read_costs("tiny") == {}


@pytest.mark.parametrize("what", ["finished", "clips"])
def test_what_took_long_is_kept_until_its_stage_is_done(root, monkeypatch, what):
    write(root)
    kept = root / "outputs/.resume/tiny/00_x/0123456789abcdef" / what
    kept.mkdir(parents=True)

    def fail(*_):
        raise RuntimeError("after the training")

    monkeypatch.setattr(stage, "_execute", fail)
    with pytest.raises(RuntimeError):
        stage.run("00_x", "tiny")
    assert kept.is_dir()
    monkeypatch.setattr(stage, "_execute", lambda *_: None)
    stage.run("00_x", "tiny")
    assert not kept.parent.exists() and costs.read_costs("tiny") == {}


def test_what_a_finished_run_leaves_is_no_unfinished_one(root, monkeypatch):
    write(root)
    monkeypatch.setattr(stage, "_execute", lambda *_: None)
    (root / "outputs/.resume/tiny/00_x/models/learned").mkdir(parents=True)
    (root / "outputs/.resume/tiny/00_x/models/learned/train.log").write_text("")
    stage.run("00_x", "tiny")
    assert "00_x" in costs.read_costs("tiny")


# ---- kernels --------------------------------------------------------------------------------


def test_a_kernel_imports_the_tlv_of_its_own_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    paths = notebooks.environment(1)["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(notebooks.ROOT), "/elsewhere"]


@pytest.mark.slow
def test_a_kernel_starts_though_temporary_files_lie_far_down(tmp_path, monkeypatch):
    long = tmp_path / ("a" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with notebooks.private_kernel() as manager:
        NotebookClient(notebook("print(1)"), km=manager).execute()
