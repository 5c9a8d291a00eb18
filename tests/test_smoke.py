"""Smoke inputs are what the notebooks' defaults make, and are made in scratch only."""

import ast

import nbformat
import pytest

from tlv import ROOT, smoke


def defaults(name: str) -> dict:
    """The literals of a notebook's parameters cell."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    return {
        line.target.id: ast.literal_eval(line.value)
        for line in ast.parse(cell.source).body
        if isinstance(line, ast.AnnAssign)
    } | {
        line.targets[0].id: ast.literal_eval(line.value)
        for line in ast.parse(cell.source).body
        if isinstance(line, ast.Assign)
    }


@pytest.mark.parametrize(
    "name, made_with",
    [
        ("00_toy_world", smoke.WORLD | smoke.BACKBONES),
        ("02_architecture", smoke.MODEL),
    ],
)
def test_what_is_made_on_the_spot_is_what_the_notebook_makes(name, made_with):
    found = defaults(name)
    assert {key: found[key] for key in made_with} == made_with


def test_outside_scratch_a_missing_input_is_an_error():
    with pytest.raises(FileNotFoundError, match="run the notebook that writes it, or `dvc repro`"):
        smoke.world("outputs/no_such_preset/00_toy_world/world")


def test_a_world_that_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smoke, "SCRATCH", tmp_path)
    monkeypatch.setattr(smoke, "_world", lambda folder: pytest.fail("made again"))
    (tmp_path / "world.json").write_text("{}")
    assert smoke.world(tmp_path) == tmp_path
    assert capsys.readouterr().out == ""
