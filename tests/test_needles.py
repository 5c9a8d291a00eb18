"""Long clips: pieces joined without loss, one needle that alone can answer, equal on every run."""

import json

import numpy as np
import pytest

from tlv import needles, world
from tlv.card import read_card
from tlv.chat import parse_conversation
from tlv.mp4 import join, write_video
from tlv.toy_data import make_world
from tlv.video import VideoError, probe, read_frames


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, seed=0, num_train=20, num_val=2, num_test=30, defect_share=0.05)
    card = read_card(folder)
    found = json.loads(card["test_questions"].read_text())
    return needles.load_pieces(card, list(dict.fromkeys(q["video"] for q in found)))


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_joined_pieces_decode_to_the_pixels_they_had(pieces, tmp_path):
    join(tmp_path / "long.mp4", [p.path for p in pieces[:6]])
    alone = np.concatenate([read_frames(p.path) for p in pieces[:6]])
    assert np.array_equal(read_frames(tmp_path / "long.mp4"), alone)
    info = probe(tmp_path / "long.mp4")
    assert info.num_frames == sum(p.num_frames for p in pieces[:6]) and info.fps == world.FPS
    join(tmp_path / "again.mp4", [p.path for p in pieces[:6]])
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "long.mp4").read_bytes()


def test_a_piece_of_another_size_is_refused_and_nothing_is_left(pieces, tmp_path):
    write_video(tmp_path / "wide.mp4", np.zeros((4, 64, 96, 3), np.uint8), world.FPS)
    with pytest.raises(VideoError, match=r"wide\.mp4: cannot follow .* encoded otherwise"):
        join(tmp_path / "long.mp4", [pieces[0].path, tmp_path / "wide.mp4"])
    assert not list(tmp_path.glob("long*"))


def test_only_the_needle_answers(pieces, tmp_path, rng):
    for _ in range(10):
        needle = needles.make_needle(tmp_path, rng)
        clip = needles.hide(pieces, needle, 400, rng.uniform(), rng)
        colour, shape = needle.scene.things[0].pair
        others = {pair for p in clip.pieces if p is not needle for pair in p.scene.pairs()}
        assert all(colour != c and shape != s for c, s in others)
        asked = needles.ask(needle)
        assert [q["type"] for q in asked] == ["shape", "place", "colour", "place"]
        for question in asked:  # the name is in the question, and never the answer
            assert question["query"] in (colour, shape)
            assert question["query"] in question["question"]
            assert question["answer"] not in question["question"].split()


def test_the_needle_lies_where_it_is_said_to(pieces, tmp_path, rng):
    needle = needles.make_needle(tmp_path, rng)
    clip = needles.hide(pieces, needle, 600, 0.5, rng)
    join(tmp_path / "long.mp4", [p.path for p in clip.pieces])
    frames = read_frames(tmp_path / "long.mp4")
    assert len(frames) == clip.num_frames <= 600
    inside = frames[clip.start : clip.start + needle.num_frames]
    assert np.array_equal(inside, read_frames(needle.path))
    assert abs(clip.start / len(frames) - 0.5) < 0.1
    assert clip.holds([clip.start]) and clip.holds([0, clip.start + needle.num_frames - 1])
    assert not clip.holds([clip.start - 1, clip.start + needle.num_frames])


@pytest.mark.parametrize("depth, where", [(0.0, 0), (1.0, -1)])
def test_depths_reach_both_ends(pieces, tmp_path, rng, depth, where):
    needle = needles.make_needle(tmp_path, rng)
    clip = needles.hide(pieces, needle, 500, depth, rng)
    assert clip.pieces[where] is needle


def test_a_haystack_longer_than_all_pieces_draws_them_again(pieces, tmp_path, rng):
    needle = needles.make_needle(tmp_path, rng)
    clip = needles.hide(pieces, needle, 5000, 0.3, rng)
    assert 5000 - world.MAX_SECONDS * world.FPS < clip.num_frames <= 5000
    with pytest.raises(ValueError, match="frames are left"):
        needles.hide(pieces, needle, 5, 0.3, rng)
    with pytest.raises(ValueError, match="^0 of 0 pieces"):
        needles.hide([], needle, 500, 0.3, rng)


def test_a_distractor_shows_the_needles_thing_in_the_other_size(pieces, tmp_path, rng):
    needle = needles.make_needle(tmp_path, rng)
    distractor = needles.make_distractor(tmp_path, needle, rng)
    mine, its = needle.scene.things[0], distractor.scene.things[0]
    assert mine.pair == its.pair and mine.size != its.size and its.direction
    clip = needles.hide(pieces, needle, 600, 0.5, rng, [distractor])
    assert sum(p is distractor for p in clip.pieces) == 1
    assert probe(distractor.path).num_frames == needles.DISTRACTOR_FRAMES


def test_written_data_is_the_same_on_every_run(pieces, tmp_path):
    for name in ("a", "b"):
        needles.write_training(tmp_path / name, pieces, seed=1, num_samples=20, num_needles=6,
                               num_frames=200)
        needles.write_test(tmp_path / name, pieces, seed=1, lengths=(150, 250), num_depths=2,
                           num_each=1)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 2 + 6 + 2 * 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    questions = json.loads((tmp_path / "a" / "questions.json").read_text())
    assert {(q["num_frames"], q["depth"] < 0.5) for q in questions} == {
        (150, True), (150, False), (250, True), (250, False)}  # fmt: skip


def test_training_samples_show_one_needle_and_ask_by_its_query(pieces, tmp_path):
    path = needles.write_training(tmp_path, pieces, seed=2, num_samples=40, num_needles=9,
                                  num_frames=150)
    for sample in json.loads(path.read_text()):
        files = [tmp_path / file for file in sample["video"]]
        assert all(file.is_file() for file in files)
        assert sum(file.parent.name == "parts" for file in files) == 1
        assert sum(probe(file).num_frames for file in files) <= 150
        for question, answer in parse_conversation(sample):
            assert f" {sample['query']}" in question and sample["query"] not in answer


def test_published_data_has_no_scenes_and_the_message_says_what_to_run():
    with pytest.raises(ValueError, match="names no scenes.*dvc repro 05_evaluation"):
        needles.load_pieces({"videos_dir": "data/x", "truth": None}, ["a.mp4"])
