"""A card of data that exists already: its paths in any clone, and whether other data is noticed."""

import json
import shutil

import pytest

from tlv import card
from tlv.card import CARD_KEYS, adopt_card, read_card


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a card, annotations and model folders; one part lies outside of it."""
    root = tmp_path / "project"
    for part in CARD_KEYS:
        folder = root / "data" / part
        folder.mkdir(parents=True)
        (folder / "file.json").write_text(part)
    paths = {part: f"data/{part}/file.json" for part in CARD_KEYS}
    paths |= {part: f"data/{part}" for part in CARD_KEYS if part.endswith("_dir")}
    paths |= {"pair_dir": str(tmp_path / "far"), "pictures": "data/pictures.json", "truth": None}
    (root / "data/own.json").write_text(json.dumps(paths))
    monkeypatch.setattr(card, "ROOT", root)
    return root


def test_an_adopted_cards_paths_are_right_and_equal_in_every_clone(project, tmp_path, monkeypatch):
    adopt_card("data/own.json", project / "outputs/own/world")
    found = read_card(project / "outputs/own/world")
    assert found["raw_qa"] == project / "data/raw_qa/file.json"
    assert found["videos_dir"] == project / "data/videos_dir"
    assert found["pair_dir"] == tmp_path / "far" and found["pictures"] == "data/pictures.json"
    other = shutil.copytree(project, tmp_path / "other")
    monkeypatch.setattr(card, "ROOT", other)
    adopt_card("data/own.json", other / "outputs/own/world")
    for name in ("world.json", "digests.json"):
        files = (root / "outputs/own/world" / name for root in (project, other))
        assert len({file.read_bytes() for file in files}) == 1


def test_outputs_may_be_a_link_to_another_disk(project, tmp_path):
    (tmp_path / "disk/a/b").mkdir(parents=True)
    (project / "outputs").symlink_to(tmp_path / "disk/a/b")
    adopt_card("data/own.json", project / "outputs/own/world")
    assert read_card(project / "outputs/own/world")["raw_qa"].read_text() == "raw_qa"


@pytest.mark.parametrize("part", ["raw_qa", "llm_dir"])
def test_other_annotations_or_weights_change_what_dvc_watches(project, part):
    digests = project / "outputs/own/world/digests.json"
    adopt_card("data/own.json", digests.parent)
    before = json.loads(digests.read_text())
    (project / "data" / part / "file.json").write_text("other")
    adopt_card("data/own.json", digests.parent)
    after = json.loads(digests.read_text())
    assert [name for name in before if before[name] != after[name]] == [part]
    assert before["pair_dir"] == {}  # it is not there
