"""Folders that are whole or absent, and the identity of a run."""

import dataclasses
import json
import os

import pytest

from tlv import ROOT, checkpoint, files
from tlv import config as settings
from tlv.config import resume_root
from tlv.train_config import TrainConfig


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data.json").write_text("[]")
    return TrainConfig(model_dir=str(tmp_path / "model"), data=str(tmp_path / "data.json"),
                       videos_dir=str(tmp_path), out_dir=str(tmp_path / "out"), num_steps=1,
                       lr_connector=1.0)


OTHER = "0123456789abcdef"  # another run's fingerprint


def make(folder, name="file", text="new"):
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    return folder


def test_the_fingerprint_knows_settings_ranks_inputs_and_code(config, tmp_path, monkeypatch):
    first = checkpoint.fingerprint(config, 1)
    assert first == checkpoint.fingerprint(config, 1) and len(first) == 16
    others = {checkpoint.fingerprint(dataclasses.replace(config, seed=1), 1),
              checkpoint.fingerprint(config, 2)}
    (tmp_path / "model" / "config.json").write_text("{ }")
    others.add(checkpoint.fingerprint(config, 1))
    (tmp_path / "data.json").write_text("[ ]")
    others.add(checkpoint.fingerprint(config, 1))
    make(tmp_path / "copy" / "tlv", "train.py", "")
    make(tmp_path / "copy" / "params", "deepspeed_zero0.json", "{}")
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path / "copy")  # other code
    others.add(last := checkpoint.fingerprint(config, 1))
    assert len(others | {first}) == 6
    (tmp_path / "copy" / "tlv" / "report.py").write_text("")  # which no training needs
    assert checkpoint.fingerprint(config, 1) == last


@pytest.mark.parametrize("package", ["torch", "deepspeed", "transformers", "peft"])
def test_the_fingerprint_knows_the_versions_that_training_rests_on(config, monkeypatch, package):
    first, version = checkpoint.fingerprint(config, 1), checkpoint.version
    monkeypatch.setattr(checkpoint, "version", lambda n: "0" if n == package else version(n))
    assert checkpoint.fingerprint(config, 1) != first


def test_unfinished_runs_live_outside_what_the_pipeline_deletes(tmp_path):
    root = resume_root("outputs/tiny/03_pretraining")
    assert root == ROOT / "outputs" / ".resume" / "tiny" / "03_pretraining"
    assert resume_root(tmp_path / "out") == tmp_path / ".resume" / "out"


def test_publish_replaces_the_whole_folder(tmp_path):
    make(tmp_path / "final", "stale", "old")
    files.publish(make(tmp_path / "final.tmp"), tmp_path / "final")
    assert [p.name for p in (tmp_path / "final").iterdir()] == ["file"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final"]


def test_a_publish_cut_short_loses_neither_the_old_folder_nor_the_new_one(tmp_path, monkeypatch):
    final, calls = make(tmp_path / "final", text="old"), []
    replace = os.replace

    def fail_at_the_second(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        files.publish(make(tmp_path / "final.tmp"), final)
    texts = {p.name: (p / "file").read_text() for p in tmp_path.iterdir()}
    assert texts == {"final.old": "old", "final.tmp": "new"}


def test_a_draft_takes_its_name_when_it_is_complete(tmp_path):
    final = tmp_path / "a" / "final"
    with pytest.raises(KeyboardInterrupt), files.draft_of(final) as draft:
        (draft / "half").write_text("")
        raise KeyboardInterrupt
    assert not final.exists()
    with files.draft_of(final) as draft:
        (draft / "file").write_text("new")
    assert [p.name for p in final.iterdir()] == ["file"]
    assert [p.name for p in final.parent.iterdir()] == ["final"]


def test_only_finished_steps_count_and_the_newest_wins(tmp_path):
    for name in ("step-9", "step-10", "step-11.tmp", "step-8.old"):
        make(tmp_path / "mark" / name)
    path, sentence = checkpoint.find_resume(tmp_path, "mark")
    assert path.name == "step-10" and sentence == "resuming at step 10"
    checkpoint.remove_others(tmp_path, "mark")
    assert sorted(p.name for p in (tmp_path / "mark").iterdir()) == ["step-10", "step-9"]


def test_a_clean_start_says_why(tmp_path):
    assert checkpoint.find_resume(tmp_path, "mark")[1] == "starting clean: no unfinished run"
    make(tmp_path / OTHER / "step-3")
    found, sentence = checkpoint.find_resume(tmp_path, "mark")
    assert found is None and "settings, inputs or code differ" in sentence
    checkpoint.remove_others(tmp_path, "mark")
    assert not (tmp_path / OTHER).exists()


def test_the_unfinished_runs_of_a_stage_nested_below_stay(tmp_path, monkeypatch):
    """As notebook 04's 04_sft/own/tuned, which lies in the folder of 04_sft's."""
    monkeypatch.setattr(settings, "ROOT", tmp_path.resolve())
    stages = [tmp_path / "outputs/04_sft" / name for name in ("", "own", "own/tuned")]
    first, *nested = (make(resume_root(s) / OTHER / "step-3") for s in stages)
    checkpoint.remove_others(resume_root(stages[0]), "mark")
    assert not first.exists() and all(folder.is_dir() for folder in nested)


def test_settings_files_of_zero_are_valid():
    for stage in (0, 1, 2, 3):
        settings = json.loads((ROOT / "params" / f"deepspeed_zero{stage}.json").read_text())
        assert settings["zero_optimization"]["stage"] == stage
        assert "gradient_clipping" not in settings  # max_grad_norm is the one home of clipping
