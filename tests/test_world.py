"""The toy world: the same bytes every time, truthful questions, nothing given away by one frame."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from tlv import ROOT, defects, questions, toy_data, world
from tlv.card import read_card
from tlv.chat import parse_conversation
from tlv.evaluate import extract_choice
from tlv.filters import caption_of, is_good_caption, is_well_formed
from tlv.toy_data import make_pictures, make_world
from tlv.video import VideoError, probe, read_frames, read_image

SIZES = dict(seed=5, num_train=40, num_val=3, num_test=12, defect_share=0.05)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [world.sample_scene(rng) for _ in range(400)]


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, **SIZES)
    return read_card(folder)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A larger world in words: its clips are not written."""
    folder = tmp_path_factory.mktemp("told")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_data, "_write_clips", lambda *_: None)
        make_world(folder, seed=3, num_train=200, num_val=60, num_test=30, defect_share=0.05)
    return read_card(folder)


def truth_of(card):
    return json.loads(card["truth"].read_text())["defects"]


def scene_of(told: dict) -> world.Scene:
    things = tuple(world.Thing(**thing) for thing in told["things"])
    events = tuple(world.Event(**event) for event in told["events"])
    return world.Scene(told["num_frames"], things, events, tuple(told["background"]))


def scenes_of(card) -> dict[str, world.Scene]:
    told = json.loads(card["truth"].read_text())["scenes"]
    return {name: scene_of(scene) for name, scene in told.items()}


def texts_of(samples) -> str:
    return "\n".join(turn["value"] for s in samples for turn in s["conversations"]).lower()


# ---- scenes and frames ----------------------------------------------------------------------


def test_a_thing_that_moves_right_is_drawn_further_right():
    thing = world.Thing("red", "circle", "small", 10.0, 32.0, "right", 2.0)
    frames = world.render(world.Scene(11, (thing,)))
    columns = (frames[..., 0] > 150).any(1)  # (T, W)
    centres = [np.flatnonzero(row).mean() for row in columns]
    assert centres[10] - centres[0] == pytest.approx(20, abs=0.6)


def test_what_leaves_at_an_edge_comes_back_at_the_other():
    at_edge = world.Thing("white", "ring", "large", 0.0, 32.0)
    centred = world.Thing("white", "ring", "large", 32.0, 32.0)
    a, b = (world.render(world.Scene(1, (t,)))[0] for t in (at_edge, centred))
    assert np.array_equal(np.roll(a, 32, axis=1), b)


def test_things_appear_leave_and_change_colour_at_their_frame():
    things = (
        world.Thing("red", "circle", "small", 20, 20),
        world.Thing("blue", "bar", "large", 40, 50),
    )
    events = (world.Event("appears", 0, 4, 8), world.Event("changes colour", 1, 6, 9, "green"))
    scene = world.Scene(10, things, events)
    frames = world.render(scene)
    assert tuple(frames[3, 20, 20]) == scene.background
    assert tuple(frames[4, 20, 20]) == world.COLOURS["red"]
    assert tuple(frames[5, 50, 40]) == world.COLOURS["blue"]
    assert tuple(frames[6, 50, 40]) == tuple(frames[8, 50, 40]) == world.COLOURS["green"]
    assert tuple(frames[9, 50, 40]) == world.COLOURS["blue"]
    assert tuple(frames[7, 20, 20]) == world.COLOURS["red"]
    assert tuple(frames[8, 20, 20]) == scene.background


def test_things_never_touch_and_something_always_happens(scenes):
    for scene in scenes:
        assert not scene.is_still
        frames = np.arange(scene.num_frames)
        for i, a in enumerate(scene.things):
            for b in scene.things[i + 1 :]:
                reach = world.SIZES[a.size] + world.SIZES[b.size]
                assert world.torus_distance(a, b, frames).min() > reach


def test_events_pass_one_after_the_other_and_each_falls_on_a_sampled_frame(scenes):
    found = [scene for scene in scenes if scene.events]
    assert len(found) > 100
    for scene in found:
        first, second = scene.events
        assert first.kind == second.kind and first.thing != second.thing
        assert 0 < first.frame < first.until <= second.frame < second.until < scene.num_frames
        frames = np.linspace(0, scene.num_frames - 1, 8, dtype=int)
        assert first.is_on(frames).any() and second.is_on(frames).any()


def test_number_and_size_of_things_and_place_are_not_skewed_by_redrawing(scenes):
    for number, share in enumerate(world.NUM_THINGS_SHARES, start=1):
        found = sum(len(scene.things) == number for scene in scenes) / len(scenes)
        assert found == pytest.approx(share, abs=0.1)
    small = [thing.size == "small" for scene in scenes for thing in scene.things]
    assert np.mean(small) == pytest.approx(0.5, abs=0.07)
    by_direction = {}
    for thing in (t for s in scenes for t in s.things if t.direction):
        by_direction.setdefault(thing.direction, []).append(thing.x / world.SIZE)
    for places in by_direction.values():
        assert np.mean(places) == pytest.approx(0.5, abs=0.1)


def test_training_scenes_show_no_held_out_pair(scenes):
    assert not any(scene.pairs() & set(world.HELD_OUT_PAIRS) for scene in scenes)


def test_an_unknown_shape_is_refused_by_name():
    with pytest.raises(ValueError, match="'star' is not one of circle, ring, bar, pillar"):
        world.draw_shape("star", np.zeros(1), np.zeros(1), 5)


# ---- questions ------------------------------------------------------------------------------


THINGS = (
    world.Thing("red", "circle", "small", 30, 10, "left", 1.0),
    world.Thing("blue", "bar", "large", 40, 40),
)


def test_answers_follow_from_the_scene():
    events = world.Event("leaves", 1, 8, 12), world.Event("leaves", 0, 16, 20)
    scene = world.Scene(20, THINGS, events)
    asked = questions.ask(scene, np.random.default_rng(0))
    answers = {q.type: q.answer for q in asked}
    assert answers["order"] == "blue bar"
    assert answers["direction"] == "left"
    assert answers["count"] == "two"
    assert questions.caption(scene) == (
        # seen last in frame 15, at x = 15
        "A small red circle moves left from north to northwest and a large blue bar stays still "
        "in the centre. First the blue bar leaves, then the red circle leaves."
    )


def test_a_picture_is_asked_what_one_frame_tells():
    scene = world.Scene(20, THINGS)
    asked = {q.type: q for q in questions.ask_picture(scene, np.random.default_rng(0))}
    assert asked.keys() == {"colour", "shape", "size", "place", "count", "existence"}
    assert asked["place"].text.endswith(("circle?", "bar?"))  # there is no start and no end
    assert questions.picture_caption(scene) == (
        "A small red circle in the north and a large blue bar in the centre."
    )


def test_nothing_is_asked_that_has_no_one_answer():
    ring = world.Thing("green", "ring", "small", 10, 50)
    changes = (
        world.Event("changes colour", 0, 8, 20, "white"),
        world.Event("changes colour", 1, 12, 20, "purple"),
    )  # fmt: skip
    asked = questions.ask(world.Scene(20, (*THINGS, ring), changes), np.random.default_rng(0))
    told = {q.text: q.answer for q in asked}
    assert "What colour is the circle?" not in told and told["What colour is the ring?"] == "green"
    assert told["Where is the green ring at the end?"] == "southwest"  # the circle is white then
    events = world.Event("appears", 0, 12, 20), world.Event("appears", 1, 16, 20)
    late = world.Scene(20, THINGS, events)
    asked = questions.ask(late, np.random.default_rng(0))
    places = {q.text: q.answer for q in asked if q.type == "place"}
    assert set(places) < {f"Where is the {thing.name} at the end?" for thing in THINGS}


def test_no_place_is_asked_of_a_thing_across_a_line(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        asked = [q for q in questions.ask(scene, rng) if q.type == "place" and "start" in q.text]
        for question in asked:
            thing = next(t for t in scene.things if t.name in question.text)
            x, y = (v - world.SIZE / 3 * round(v * 3 / world.SIZE) for v in (thing.x, thing.y))
            assert min(abs(x), abs(y)) >= world.CLEAR  # pixels to the nearest line


def test_existence_is_balanced_and_true(scenes):
    rng = np.random.default_rng(1)
    for scene in scenes:
        asked = [q for q in questions.ask(scene, rng) if q.type == "existence"]
        assert [q.answer for q in asked] == ["yes", "no"]
        for question in asked:
            colour, shape = question.text.removeprefix("Is there a ").rstrip("?").split()
            assert (question.answer == "yes") == ((colour, shape) in scene.pairs())


def test_the_letter_of_a_choice_points_at_the_answer(scenes):
    rng, letters = np.random.default_rng(2), Counter()
    for scene in scenes:
        for question in questions.ask(scene, rng):
            text, letter, options = questions.as_choice(question, rng)
            assert f"\n{letter}. {question.answer}\n" in f"{text}\n"
            assert len(set(options)) == len(options) <= 4
            answer = questions.write_turn(question, rng, 1.0)[1]
            assert extract_choice(answer, ["?"] * 4) and answer.startswith(question.answer)
            if question.type == "direction":
                letters[letter] += 1
    assert max(letters.values()) / letters.total() < 0.4


# ---- the folder on disk ---------------------------------------------------------------------


def test_the_world_is_the_same_bytes_on_every_run(card, tmp_path):
    again = read_card(make_world(tmp_path / "again", **SIZES).parent)
    for key in ("raw_captions", "raw_qa", "val_qa", "test_questions", "truth"):
        assert card[key].read_bytes() == again[key].read_bytes()
    names = sorted(p.name for p in card["videos_dir"].iterdir())
    assert names == sorted(p.name for p in again["videos_dir"].iterdir())
    for name in names:
        assert (card["videos_dir"] / name).read_bytes() == (again["videos_dir"] / name).read_bytes()


@pytest.mark.slow
def test_the_world_is_the_same_whatever_the_hash_seed(tmp_path):
    """Sets of strings have another order in every process."""
    code = """if True:
        import hashlib, sys
        from pathlib import Path
        from tlv.toy_data import make_world
        make_world(sys.argv[1], seed=0, num_train=8, num_val=2, num_test=3, defect_share=0.1)
        files = sorted(path for path in Path(sys.argv[1]).rglob("*") if path.is_file())
        for path in files:
            print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    """
    told = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)], cwd=ROOT, check=True,
            capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.splitlines()
        for seed in "01"
    ]  # fmt: skip
    assert len(told[0]) > 13 and told[0] == told[1]


def test_clips_are_small_short_and_of_eight_frames_a_second(card):
    """By what the files say."""
    truth = truth_of(card)
    clean = {
        sample["video"]
        for key in ("raw_captions", "val_captions", "test_questions")
        for sample in json.loads(card[key].read_text())
        if sample["id"] not in truth
    }
    found = [probe(card["videos_dir"] / name) for name in clean]
    assert len(found) > 40
    for info in found:
        assert 48 <= info.width <= 64 and 48 <= info.height <= 64
        assert 2 <= info.duration <= 8 and info.fps == pytest.approx(8, abs=0.5)


def test_every_kind_of_defect_is_planted_in_its_share(card):
    kinds = Counter(entry["kind"] for entry in truth_of(card).values())
    per_clip = round(SIZES["defect_share"] * SIZES["num_train"])
    for kind in defects.CLIP_DEFECTS:
        assert kinds[kind] == 2 * per_clip  # a caption and a conversation of the same clip
    for kind in defects.TEXT_DEFECTS:
        assert kinds[kind] == per_clip


def test_one_training_clip_in_twenty_is_clean_but_looks_like_a_defect(told):
    truth, scenes = truth_of(told), scenes_of(told)
    pool = json.loads(told["raw_captions"].read_text())
    planted = {s["id"] for s in pool if truth.get(s["id"], {}).get("kind") in defects.CLIP_DEFECTS}
    clean = [scenes[sample["video"]] for sample in pool if sample["id"] not in planted]
    slow = [scene for scene in clean if not scene.is_still and not scene.events
            and all(t.speed * scene.num_frames < 0.2 * world.SIZE for t in scene.things)]
    looks = {(scene.background, *sorted(t.pair for t in scene.things)) for scene in clean}
    assert len(clean) == 200 and len(slow) == 5
    assert len(looks) == 195  # as many show the things and the background of another clip


def test_nothing_that_is_written_for_training_shows_a_held_out_pair(told):
    truth, scenes = truth_of(told), scenes_of(told)
    kinds = {sample_id: entry["kind"] for sample_id, entry in truth.items()}
    for key in ("raw_captions", "raw_qa", "val_captions", "val_qa"):
        samples = json.loads(told[key].read_text())
        samples = [s for s in samples if kinds.get(s["id"]) != "leaked_test_clip"]
        # Shuffled words may stand anyhow; that they are their own clip's is tested below.
        ordered = [s for s in samples if kinds.get(s["id"]) != "degenerate_caption"]
        for colour, shape in world.HELD_OUT_PAIRS:
            assert f"{colour} {shape}" not in texts_of(ordered), key
            shown = [s["video"] for s in samples if (colour, shape) in scenes[s["video"]].pairs()]
            assert not shown, key


def test_every_test_question_is_asked_once_in_each_form(told):
    asked = json.loads(told["test_questions"].read_text())
    forms = {}
    for question in asked:
        text = question["question"].split("\n")[0]  # without the options
        forms.setdefault((question["video"], question["type"], text), []).append(question["form"])
    assert all(sorted(found) == ["choice", "free"] for found in forms.values())


def test_many_processes_write_the_bytes_that_one_writes(tmp_path, monkeypatch):
    rng, pools = np.random.default_rng(0), []
    monkeypatch.setattr(toy_data, "ProcessPoolExecutor",
                        lambda *args: pools.append(args) or ProcessPoolExecutor(*args))
    scenes = [world.Scene(8, world.sample_scene(rng).things) for _ in range(200)]  # short ones
    clips = [toy_data.Entry(scene, f"{i}.mp4") for i, scene in enumerate(scenes)]
    for name, part in (("one", clips[:100]), ("one", clips[100:]), ("many", clips)):
        (tmp_path / name).mkdir(exist_ok=True)
        toy_data._write_clips(tmp_path / name, part, [], rng)
    assert len(pools) == 1  # a hundred clips are not worth starting any
    for clip in clips:
        one, many = (tmp_path / name / clip.name for name in ("one", "many"))
        assert one.read_bytes() == many.read_bytes()


def test_neither_a_name_nor_the_order_says_what_is_planted(card):
    """No correlation beyond three standard deviations of chance, in any annotation file, and no
    quarter with more of them than four."""
    truth = truth_of(card)
    for key in ("raw_captions", "raw_qa"):
        pool = json.loads(card[key].read_text())
        is_planted = [sample["id"] in truth for sample in pool]
        told = {field: [sample[field] for sample in pool] for field in ("video", "id")}
        for what, values in {"order": range(len(pool)), **told}.items():
            rank = np.argsort(np.argsort(values))
            r = np.corrcoef(is_planted, rank)[0, 1]
            assert abs(r) < 3 / len(pool) ** 0.5, f"{key}, {what}: r = {r:.2f}"
            parts = np.array_split(np.array(is_planted)[np.argsort(rank)], 4)  # nor a middle one
            share, most = np.mean(is_planted), 4 * (np.var(is_planted) / len(parts[-1])) ** 0.5
            assert all(abs(part.mean() - share) < most for part in parts), f"{key}, {what}"


def test_defects_are_what_they_say(card):
    truth, videos = truth_of(card), card["videos_dir"]
    samples = {
        s["id"]: s for key in ("raw_captions", "raw_qa") for s in json.loads(card[key].read_text())
    }
    scenes = scenes_of(card)
    held_out = {q["video"] for q in json.loads(card["test_questions"].read_text())}
    held_out = [read_frames(videos / name).astype(int) for name in held_out]
    for sample_id, entry in truth.items():
        sample, kind = samples[sample_id], entry["kind"]
        path = videos / sample["video"]
        if kind in ("unreadable", "truncated", "empty"):
            with pytest.raises(VideoError):
                read_frames(path)
        elif kind == "static":
            assert (
                np.ptp(read_frames(path).astype(int), axis=0).max() < 60
            )  # only the codec's noise
        elif kind == "duplicate":
            twin = samples[entry["twin"]]["video"]
            assert twin != sample["video"] and path.read_bytes() == (videos / twin).read_bytes()
        elif kind == "near_duplicate":
            twin = videos / samples[entry["twin"]]["video"]
            assert path.read_bytes() != twin.read_bytes()
            gap = np.abs(read_frames(path).astype(int) - read_frames(twin)).mean()
            assert gap < 5
        elif kind == "malformed_conversation":
            assert not is_well_formed(sample)[0]
        elif kind == "wrong_caption":  # fluent, and of things that are not there
            text = caption_of(sample).lower()
            named = {(c, s) for c in world.COLOURS for s in world.SHAPES if f"{c} {s}" in text}
            assert named and not named & scenes[sample["video"]].pairs()
            assert is_good_caption(text, 4, 120, 0.5)[0]
        elif kind == "short_caption":
            assert not is_good_caption(caption_of(sample), 4, 120, 0.5)[0]
        elif kind == "degenerate_caption":  # a loop of two words, or its own words in no order
            text = questions.caption(scenes[sample["video"]]).lower()
            words, own = caption_of(sample).split(), re.findall(r"\w+", text)
            is_loop = not is_good_caption(" ".join(words), 4, 120, 0.5)[0]
            assert words != own and (is_loop or sorted(words) == sorted(own))
        else:
            assert kind == "leaked_test_clip"
            frames = read_frames(path)
            gaps = [np.abs(frames - test).mean() for test in held_out if len(test) == len(frames)]
            assert sum(gap < 5 for gap in gaps) == 1


def test_every_clean_sample_reads_and_parses(card):
    truth = truth_of(card)
    for key in ("raw_captions", "raw_qa", "val_captions", "val_qa"):
        for sample in json.loads(card[key].read_text()):
            if sample["id"] not in truth:
                assert parse_conversation(sample)
                assert len(read_frames(card["videos_dir"] / sample["video"], [0])) == 1


def test_splits_share_no_clip_and_a_third_of_the_test_clips_is_unseen(card):
    names = {key: {s["video"] for s in json.loads(card[key].read_text())}
             for key in ("raw_qa", "val_qa", "test_questions")}  # fmt: skip
    assert not names["raw_qa"] & names["val_qa"] and not names["raw_qa"] & names["test_questions"]
    asked = json.loads(card["test_questions"].read_text())
    unseen = {q["video"] for q in asked if q["unseen_pair"]}
    assert len(unseen) / len(names["test_questions"]) == pytest.approx(1 / 3, abs=0.05)


def test_pictures_have_a_card_of_their_own_and_the_same_bytes_every_time(tmp_path):
    sizes = dict(seed=1, num_train=4, num_val=2, num_test=3)
    first, second = (
        read_card(make_pictures(tmp_path / name / "pictures", **sizes).parent) for name in "ab"
    )
    folder = first["videos_dir"]
    assert first["vision_dir"].resolve() == (tmp_path / "a/backbones/vision").resolve()
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == 9
    assert all((folder / n).read_bytes() == (second["videos_dir"] / n).read_bytes() for n in files)
    samples = [s for key in ("raw_qa", "val_captions") for s in json.loads(first[key].read_text())]
    for sample in samples:
        assert read_image(folder / sample["image"]).shape == (1, world.SIZE, world.SIZE, 3)
        assert parse_conversation(sample)[0][0].startswith("<video>")
    asked = json.loads(first["test_questions"].read_text())
    assert not {q["type"] for q in asked} & set(questions.HARD_TYPES)
    assert any(q["unseen_pair"] for q in asked)
    assert set(q["video"] for q in asked).isdisjoint(sample["image"] for sample in samples)


def test_a_missing_card_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 00 first"):
        read_card(tmp_path)
    (tmp_path / "world.json").write_text('{"videos_dir": "videos"}')
    with pytest.raises(ValueError, match="lacks raw_captions, raw_qa"):
        read_card(tmp_path)
