"""A reader's own data: what is missing or wrong is named before anything is trained."""

import json
import os
import re
import shutil
import signal
import threading

import pytest
from toy_manifest import make_world
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from tlv import ROOT, validate, video_child
from tlv.card import CARD_KEYS
from tlv.config import ConfigError
from tlv.files import write_json
from tlv.manifest import load_questions

QUESTION = {"id": "q", "video": "clip0.mp4", "type": "colour", "form": "choice",
            "question": "What colour?\nA. red\nB. blue", "answer": "B",
            "options": ["red", "blue"], "unseen_pair": False}  # fmt: skip


@pytest.fixture
def card(tmp_path, pair_dir, llm_dir):
    """A complete card, its encoder the pair too; the samples; card(**changes of parts) -> path."""
    make_world(tmp_path, 3)
    samples = json.loads((tmp_path / "data.json").read_text())
    question = QUESTION | {"video": samples[0]["video"]}
    parts = {part: samples for part in validate.MANIFESTS} | {"test_questions": [question]}

    def write(**changes):
        for part, content in (parts | changes).items():
            if part in parts:
                (tmp_path / f"{part}.json").write_text(json.dumps(content))
        paths = {part: str(tmp_path / f"{part}.json") for part in parts}
        dirs = {"videos_dir": tmp_path, "vision_dir": pair_dir, "llm_dir": llm_dir}
        dirs |= {"pair_dir": None} if "pair_dir" in changes else {}
        paths |= {key: str(changes.get(key, path)) for key, path in dirs.items()}
        (tmp_path / "card.json").write_text(json.dumps(paths))
        return tmp_path / "card.json"

    write.samples, write.question = samples, question
    return write


def reasons(path, **options):
    return [f"{p.part}: {p.reason}" for p in validate.check_card(path, **options)[0]]


def test_an_encoder_that_is_no_pair_needs_one_beside_it(card, pair_dir, tmp_path):
    """A card without pair_dir means its encoder, which must then be an image-text pair."""
    encoder = tmp_path / "dinov2"
    Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                             image_size=16, patch_size=8)).save_pretrained(encoder)  # fmt: skip
    BitImageProcessorPil().save_pretrained(encoder)
    (reason,) = reasons(card(vision_dir=encoder))
    assert reason.startswith("pair_dir: pair_dir = ") and reason.endswith(
        "a 'dinov2' model; an image-text pair is wanted, one of siglip, clip"
    )
    assert reasons(card(vision_dir=encoder, pair_dir=pair_dir)) == []


def test_a_complete_card_has_no_problems(card, capsys):
    problems, counts = validate.check_card(card(), decode=True)
    assert problems == [] and counts["raw_qa"] == 3 and counts["test_questions"] == 1
    assert validate.main([str(card())]) == 0 and "no problems" in capsys.readouterr().out


def test_the_paths_of_a_worlds_own_card_count_from_its_folder(card, tmp_path):
    parts = json.loads(card().read_text())
    inside = {key: os.path.relpath(path, tmp_path) for key, path in parts.items()}
    write_json(tmp_path / "world.json", inside)
    assert reasons(tmp_path / "world.json") == []
    write_json(tmp_path / "other.json", inside)  # another card's, from the project's folder
    assert reasons(tmp_path / "other.json")[0].endswith("is wanted")


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


def test_a_clip_that_hangs_the_decoder_is_found_too(card, tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "FRAME_S", 0.3)
    start = video_child.Child.__init__

    def stopped(self):
        start(self)
        os.kill(self._process.pid, signal.SIGSTOP)  # it never answers

    monkeypatch.setattr(video_child, "_CHILDREN", {})
    monkeypatch.setattr(video_child.Child, "__init__", stopped)
    found = reasons(card(raw_captions=card.samples[:1]), decode=True)
    assert "decoding took over 0.3 s" in found[0]


def test_clips_are_decoded_side_by_side(card, monkeypatch):
    """Two readers meet: each waits until the other reads too."""
    both, read = threading.Barrier(2, timeout=60), validate.sample_frames_within

    def meet(*given, **request):
        both.wait()
        return read(*given, **request)

    monkeypatch.setattr(validate.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(validate, "sample_frames_within", meet)
    assert reasons(card(**dict.fromkeys(validate.MANIFESTS, card.samples[:2])), decode=True) == []


def test_a_name_that_no_file_can_have_is_a_problem_of_its_sample(card):
    found = reasons(card(raw_qa=[card.samples[0] | {"video": "x" * 300}]))
    assert len(found) == 1 and "xxx: File name too long" in found[0]


def test_test_questions_are_looked_at_before_they_are_asked(card, tmp_path):
    (tmp_path / "asked.json").write_text(json.dumps([card.question, {"id": 1}]))
    with pytest.raises(ConfigError, match="asked.json: #1: lacks video, type"):
        load_questions(tmp_path / "asked.json")
    (tmp_path / "asked.json").write_text(json.dumps([card.question]))
    assert load_questions(tmp_path / "asked.json") == [card.question]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"videos_dir": "x"}', "lacks raw_captions, raw_qa, .*; a card names"),
        ('[{"videos_dir": "x"}]', r"card.json: \[\{'videos_dir': 'x'\}\] is no JSON object"),
        ("null", "card.json: None is no JSON object"),
        (json.dumps(dict.fromkeys(CARD_KEYS, "x") | {"llm_dir": 7}),
         "card.json: llm_dir = 7 must be a path in quotes"),
        (json.dumps(dict.fromkeys(CARD_KEYS, "x") | {"pair_dir": None}),
         "card.json: pair_dir = None must be a path in quotes"),
        (json.dumps(dict.fromkeys(CARD_KEYS, "x") | {"truth": 5}),
         "card.json: truth = 5 must be a path in quotes"),
        (json.dumps(dict.fromkeys(CARD_KEYS, "x") | {"pair_dri": "x"}),
         "card.json: unknown key 'pair_dri'; a card names .*, and may name pair_dir, truth"),
    ],
)  # fmt: skip
def test_a_card_without_its_parts_is_refused(content, message, tmp_path, capsys):
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        validate.check_card(tmp_path / "card.json")
    assert validate.main([str(tmp_path / "card.json")]) == 1
    assert "Traceback" not in capsys.readouterr().out


def test_a_folder_in_a_files_place_is_a_problem(card, tmp_path):
    with pytest.raises(ConfigError, match="not readable"):
        validate.check_card(tmp_path)
    path = card()
    (tmp_path / "raw_qa.json").unlink()
    (tmp_path / "raw_qa.json").mkdir()
    assert ["Is a directory" in reason for reason in reasons(path)] == [True]


def test_every_file_of_a_sample_is_looked_for(card, tmp_path):
    """A list of files is shown one after the other, as the trainer reads it."""
    first, second, *_ = (sample["video"] for sample in card.samples)
    (tmp_path / "torn.mp4").write_bytes(b"no clip")
    videos = [[first, second], [first, "gone.mp4"], [first, "torn.mp4"]]
    path = card(raw_qa=[card.samples[0] | {"video": video} for video in videos])
    assert reasons(path) == ["raw_qa: #1: gone.mp4: not in videos_dir"]
    found = reasons(path, decode=True)
    assert len(found) == 2 and found[1].startswith("raw_qa: #2: torn.mp4: ")


@pytest.mark.parametrize("video", [7, [7], ["0.mp4", None], {"name": "0.mp4"}, True, "x" * 5000])
def test_a_video_that_is_no_file_name_is_a_problem(video, card):
    (reason,) = reasons(card(raw_qa=[card.samples[0] | {"video": video}]))
    assert reason.startswith("raw_qa: #0: ")
    assert "must be a file name relative to videos_dir, or a list" in reason or "x" * 50 in reason


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"options": None}, r"options None must be a list of texts, \[\] for a free answer"),
        ({"options": ["red", 7]}, "options .* must be a list of texts"),
        ({"options": "red"}, "options 'red' must be a list of texts"),
        ({"answer": None}, "answer None must be text"),
        ({"question": 7}, "question 7 must be text"),
        ({"video": ["0.mp4"]}, "video .* must be text"),
        ({"form": ["choice"]}, "form .* must be 'free' or 'choice'"),
    ],
)
def test_a_question_of_other_types_is_a_problem(changes, message, card):
    (reason,) = reasons(card(test_questions=[card.question | changes]))
    assert re.search("test_questions: #0: " + message, reason)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": 7}, "query 7 must be text"),
        ({"conversations": [{"from": ["human"], "value": "x"}] * 2}, "from .'human'., must be"),
        ({"conversations": [7, 8]}, "turn 0: from None"),
        ({"conversations": None}, "no turns"),
        ({"video": None}, "1 .*placeholder"),
    ],
)
def test_a_sample_of_other_types_is_a_problem(changes, message, card):
    (reason,) = reasons(card(raw_qa=[card.samples[0] | changes]))
    assert re.search("raw_qa: #0: .*" + message, reason)


def _shard(folder):
    whole = folder / "model.safetensors"
    whole.rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors",
                            "b": "model-00002-of-00002.safetensors"}}  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    "part, spoil, message",
    [
        ("llm_dir", lambda f: (f / "model.safetensors").unlink(), r"no \*.safetensors in it"),
        ("llm_dir", _shard, ".* names model-00002-of-00002.safetensors, which is not there"),
        ("vision_dir", _cut, "model.safetensors is torn or no safetensors file"),
        ("llm_dir", lambda f: [t.unlink() for t in f.glob("token*")], "AutoTokenizer finds no"),
        ("vision_dir", lambda f: (f / "preprocessor_config.json").unlink(), "AutoImageProcessor "),
        ("llm_dir", lambda f: (f / "config.json").unlink(), "no config.json in it"),
        ("pair_dir", lambda f: (f / "config.json").unlink(), "no config.json in it"),
        ("pair_dir", lambda f: [t.unlink() for t in f.glob("token*")], "AutoTokenizer finds no"),
        ("pair_dir", lambda f: (f / "preprocessor_config.json").unlink(), "AutoImageProcessor "),
        ("pair_dir", shutil.rmtree, "no such folder"),
    ],
)
def test_an_unfinished_copy_of_a_model_is_a_problem(part, spoil, message, card, request, tmp_path):
    folder = tmp_path / "copy"
    whole = "pair_dir" if part == "vision_dir" else part
    shutil.copytree(request.getfixturevalue(whole), folder)
    assert reasons(card(**{part: folder})) == []
    spoil(folder)
    (reason,) = reasons(card(**{part: folder}))
    assert re.search(f"{part} = .*copy: {message}", reason)


def test_what_is_wrong_with_an_encoder_that_is_the_pair_too_is_said_once(card, pair_dir, tmp_path):
    folder = shutil.copytree(pair_dir, tmp_path / "copy")
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).unlink()
        (reason,) = reasons(card(vision_dir=folder, pair_dir=folder))
        assert reason.startswith("vision_dir: vision_dir = ")
        shutil.copy(pair_dir / name, folder)
    for file in folder.glob("token*"):
        file.unlink()
    (reason,) = reasons(card(vision_dir=folder, pair_dir=folder))
    assert reason.startswith("pair_dir: pair_dir = ") and "AutoTokenizer finds no" in reason


@pytest.mark.parametrize("name", [p.name for p in sorted((ROOT / "data").glob("*.json"))])
def test_the_cards_of_the_project_name_every_part(name, capsys):
    """Their data is not here, so each part is reported missing, and none is forgotten."""
    problems, _ = validate.check_card(ROOT / "data" / name)
    assert {problem.part for problem in problems} == set(CARD_KEYS)
