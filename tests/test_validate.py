"""A reader's own data: what is missing or wrong is named before anything is trained."""

import json

import pytest
from toy_manifest import make_world

from tlv import ROOT, validate
from tlv.config import ConfigError

QUESTION = {"id": "q", "video": "clip0.mp4", "type": "colour", "form": "choice",
            "question": "What colour?\nA. red\nB. blue", "answer": "B",
            "options": ["red", "blue"], "unseen_pair": False}  # fmt: skip


@pytest.fixture
def card(tmp_path, vision_dir, llm_dir):
    """A complete card, its folder's samples, and card(**changes of parts) -> its path."""
    make_world(tmp_path, 3)
    samples = json.loads((tmp_path / "data.json").read_text())
    question = QUESTION | {"video": samples[0]["video"]}
    parts = {part: samples for part in validate.MANIFESTS} | {"test_questions": [question]}

    def write(**changes):
        for part, content in (parts | changes).items():
            if part in parts:
                (tmp_path / f"{part}.json").write_text(json.dumps(content))
        paths = {part: str(tmp_path / f"{part}.json") for part in parts}
        dirs = {"videos_dir": tmp_path, "vision_dir": vision_dir, "llm_dir": llm_dir}
        paths |= {key: str(changes.get(key, path)) for key, path in dirs.items()}
        (tmp_path / "card.json").write_text(json.dumps(paths))
        return tmp_path / "card.json"

    write.samples, write.question = samples, question
    return write


def reasons(path, **options):
    return [f"{p.part}: {p.reason}" for p in validate.check_card(path, **options)[0]]


def test_a_complete_card_has_no_problems(card, capsys):
    problems, counts = validate.check_card(card(), decode=True)
    assert problems == [] and counts["raw_qa"] == 3 and counts["test_questions"] == 1
    assert validate.main([str(card())]) == 0 and "no problems" in capsys.readouterr().out


def test_every_problem_is_named(card, tmp_path, capsys):
    good = card.samples[0]
    lost = good | {"video": "gone.mp4"}
    odd = good | {"conversations": good["conversations"][:1]}
    path = card(raw_qa=[good, lost, odd, "x"], vision_dir=tmp_path / "nowhere", val_qa=[],
                test_questions=[card.question | {"answer": "C"}, {"id": 1}])  # fmt: skip
    found = reasons(path)
    assert len(found) == 7
    for message in ("vision_dir: vision_dir = ", "raw_qa: #1: gone.mp4: not in videos_dir",
                    "raw_qa: #2: sample", "raw_qa: #3: 'x' is no JSON object",
                    "must be a JSON list", "'C' must be one of the letters A, B of its 2 options",
                    "lacks video, type"):  # fmt: skip
        assert any(message in reason for reason in found), message
    assert validate.main([str(path)]) == 1 and "raw_qa: 3 problems" in capsys.readouterr().out


def test_a_clip_that_does_not_decode_is_found_only_when_asked_for(card, tmp_path):
    (tmp_path / "torn.mp4").write_bytes(b"no clip")
    path = card(raw_captions=[card.samples[0] | {"video": "torn.mp4"}])
    assert reasons(path) == []
    assert ["torn.mp4" in reason for reason in reasons(path, decode=True)] == [True]


def test_a_card_without_its_parts_is_refused(tmp_path):
    (tmp_path / "card.json").write_text('{"videos_dir": "x"}')
    with pytest.raises(ConfigError, match="lacks raw_captions, raw_qa, .*; a card names"):
        validate.check_card(tmp_path / "card.json")


@pytest.mark.parametrize("name", [p.name for p in sorted((ROOT / "data").glob("*.json"))])
def test_the_cards_of_the_project_name_every_part(name, capsys):
    """Their data is not here, so each part is reported missing, and none is forgotten."""
    problems, _ = validate.check_card(ROOT / "data" / name)
    assert {problem.part for problem in problems} == set(validate.CARD_KEYS)
