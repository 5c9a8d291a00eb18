"""Smoke inputs are what the notebooks' defaults make, and are made in scratch only."""

import json

import pytest

from tlv import ROOT, notebooks, smoke
from tlv.builders import load_model
from tlv.card import read_card
from tlv.files import write_json
from tlv.notebook_parameters import defaults_of


@pytest.mark.parametrize(
    "name, made_with",
    [
        ("00_toy_world", smoke.WORLD | smoke.BACKBONES),
        ("02_architecture", smoke.MODEL),
    ],
)
def test_what_is_made_on_the_spot_is_what_the_notebook_makes(name, made_with):
    found = defaults_of(notebooks.read(ROOT / "notebooks" / f"{name}.ipynb"))
    assert {key: found[key] for key in made_with} == made_with


def test_outside_scratch_a_missing_input_is_an_error():
    with pytest.raises(FileNotFoundError, match="run the notebook that writes it, or `dvc repro`"):
        smoke.world("outputs/no_such_preset/00_toy_world/world")


def test_a_models_own_folder_in_place_of_its_stages_is_pointed_out(tmp_path):
    write_json(tmp_path / "04_sft/checkpoint/config.json", {})
    assert smoke.checkpoint(tmp_path / "04_sft") == tmp_path / "04_sft"
    with pytest.raises(FileNotFoundError, match="is missing: take .*/04_sft$"):
        smoke.checkpoint(tmp_path / "04_sft/checkpoint")


@pytest.mark.slow
def test_whichever_notebook_is_opened_first_makes_what_it_needs_and_says_so(
    tmp_path, monkeypatch, capsys
):
    sizes = dict(vision_width=32, vision_layers=2, llm_width=32, llm_layers=2, batch_size=4)
    steps = dict(seed=0, vision_steps=1, llm_steps=1, num_texts=40)
    for name, value in {
        "ROOT": tmp_path, "SCRATCH": tmp_path / "outputs/scratch", "BACKBONES": steps | sizes,
        "WORLD": dict(seed=0, num_train=6, num_val=2, num_test=2, defect_share=0.1),
    }.items():  # fmt: skip
        monkeypatch.setattr(smoke, name, value)
    broken_off = tmp_path / "outputs/scratch/04_sft/checkpoint/half"
    broken_off.mkdir(parents=True)
    folder = smoke.checkpoint("outputs/scratch/04_sft")
    manifest = smoke.manifest("outputs/scratch/01_data_filtering")
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("nothing in")] == [
        f"nothing in outputs/scratch/{name} yet: making {what} (smoke scale)" for name, what in (
            ("04_sft", "an untrained model in place of a trained one"),
            ("02_architecture", "an untrained model"),
            ("00_toy_world/world", "a small toy world with hardly trained backbones"),
            ("01_data_filtering", "a manifest of the clean samples"),
        )]  # fmt: skip
    assert load_model(folder / "checkpoint") and not broken_off.exists()
    card = read_card(smoke.world("outputs/scratch/00_toy_world/world"))
    defects = json.loads(card["truth"].read_text())["defects"]
    for name in ("captions", "qa"):
        raw, kept = (json.loads(path.read_text())
                     for path in (card[f"raw_{name}"], manifest / f"{name}.json"))  # fmt: skip
        assert 0 < len(kept) < len(raw) and kept == [s for s in raw if s["id"] not in defects]
    assert smoke.checkpoint("outputs/scratch/04_sft") == folder  # now it is there
    assert capsys.readouterr().out == ""


def test_of_two_that_make_the_same_the_first_ones_stays(tmp_path):
    def make(draft):
        (draft / "model").mkdir()
        (draft / "model/config.json").write_text("second")
        (tmp_path / "02/model").mkdir(parents=True)  # meanwhile, another process
        (tmp_path / "02/model/config.json").write_text("first")

    smoke._make_whole(tmp_path / "02", "model/config.json", make)
    assert (tmp_path / "02/model/config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["02"]


def test_a_world_that_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smoke, "SCRATCH", tmp_path)
    monkeypatch.setattr(smoke, "_world", lambda folder: pytest.fail("made again"))
    (tmp_path / "world.json").write_text("{}")
    assert smoke.world(tmp_path) == tmp_path
    assert capsys.readouterr().out == ""
