"""Each filter keeps what it should keep (the look-alikes) and takes what it should take."""

import json

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tlv import clip_facts, defects, filters, funnel, world
from tlv.clip_facts import ClipFacts, KeptFacts, inspect_clips
from tlv.funnel import Funnel, with_ids
from tlv.mp4 import write_video


def scene(seed=0, **options):
    return world.sample_scene(np.random.default_rng(seed), **options)


def write(path, some_scene, crf=18):
    write_video(path, world.render(some_scene), world.FPS, crf=crf)
    return inspect(path)


def inspect(path):
    return inspect_clips(path.parent, [path.name])[path.name]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Six different clips of the world: {name: facts}."""
    folder = tmp_path_factory.mktemp("clips")
    return {f"{i}.mp4": write(folder / f"{i}.mp4", scene(i)) for i in range(6)}


# ---- clips ----------------------------------------------------------------------------------


def test_unreadable_files_are_named_for_what_they_are(tmp_path):
    path = tmp_path / "whole.mp4"
    assert filters.is_readable(write(path, scene())) == (True, "")
    (tmp_path / "half.mp4").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name, reason in (
        ("half", "truncated"), ("noise", "not a readable"), ("empty", "0 bytes"), ("no", "no such"),
    ):  # fmt: skip
        keep, why = filters.is_readable(inspect(tmp_path / f"{name}.mp4"))
        assert not keep and reason in why


def test_duration_bounds_are_inclusive():
    assert filters.has_duration(ClipFacts(duration=2.0), 2, 8)[0]
    assert filters.has_duration(ClipFacts(duration=8.0), 2, 8)[0]
    assert filters.has_duration(ClipFacts(duration=1.9), 2, 8) == (
        False,
        "lasts 1.90 s, not 2 to 8 s",
    )
    assert not filters.has_duration(ClipFacts(duration=9.0), 2, 8)[0]


def test_a_sample_without_its_clip_goes():
    judge = filters.of_clip({"a.mp4": ClipFacts()}, filters.is_readable)
    assert judge({"id": "1", "video": "a.mp4"}) == (True, "")
    assert judge({"id": "2"}) == (False, "'video' is None: no clip")


def test_a_still_clip_goes_whatever_the_codec_does_to_it(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        still = write(tmp_path / f"{index}.mp4", defects.still_scene(rng), crf=(18, 35)[index % 2])
        assert not filters.is_moving(still, 30)[0]


def test_slow_small_and_colour_only_motion_stays(tmp_path):
    rng = np.random.default_rng(0)
    slow = defects.look_alike(rng, "slow", scene())
    assert filters.is_moving(write(tmp_path / "slow.mp4", slow), 30)[0]
    dot = world.Thing("purple", "circle", "small", 20.0, 20.0)
    change = world.Event("changes colour", 0, 20, 40, "blue")
    only = world.Scene(40, (dot,), (change,))
    assert filters.is_moving(write(tmp_path / "colour.mp4", only), 30)[0]


def test_copies_exact_and_encoded_again_are_found_and_the_first_stays(tmp_path, facts):
    clips = dict(facts)
    (tmp_path / "a").mkdir()
    clips["0_again.mp4"] = write(tmp_path / "again.mp4", scene(0), crf=32)
    clips["00_same.mp4"] = write(tmp_path / "same.mp4", scene(1))
    found = filters.find_copies(clips, clips, max_distance=80)
    assert found == {"0_again.mp4": ("0.mp4", "encoded again"), "1.mp4": ("00_same.mp4", "exact")}


def test_the_same_things_on_another_course_are_no_copy(tmp_path):
    rng, one = np.random.default_rng(0), scene(3)
    like = defects.look_alike(rng, "same_things", one)
    like = world.Scene(one.num_frames, like.things, like.events, like.background)
    one = world.Scene(one.num_frames, one.things, (), one.background)
    clips = {"a": write(tmp_path / "a.mp4", one), "b": write(tmp_path / "b.mp4", like)}
    assert filters.find_copies(clips, clips, max_distance=80) == {}


def test_one_small_change_of_colour_is_no_copy(tmp_path):
    dot = world.Thing("purple", "circle", "small", 20.0, 20.0, "right", 1.5)
    one, other = (
        world.Scene(40, (dot,)),
        world.Scene(40, (dot,), (world.Event("changes colour", 0, 36, 40, "blue"),)),
    )
    clips = {"a": write(tmp_path / "a.mp4", one), "b": write(tmp_path / "b.mp4", other)}
    assert filters.find_copies(clips, clips, max_distance=80) == {}


@pytest.mark.parametrize("is_same", [True, False])
def test_copies_are_those_that_comparing_all_cells_finds(is_same):
    """Clips of a few prototypes with noise around the limit, some broken."""
    rng, pools = np.random.default_rng(0), []
    kinds = rng.integers(0, 256, (5, 1, 16, 16, 3))
    for pool in "ab":
        noise = rng.integers(-45, 46, (60, 3, 1, 1, 3))
        cells = np.clip(kinds[rng.integers(5, size=60)] + noise, 0, 255).astype(np.uint8)
        pools.append({f"{pool}{k}": ClipFacts("", 1 + 0.05 * (k % 9), cell, f"{pool}{k}")
                      for k, cell in enumerate(cells)})  # fmt: skip
    clips, references = (pools[0], pools[0]) if is_same else pools
    if not is_same:
        references["torn"] = ClipFacts("not a readable video", 1.0)
    wanted, kept = {}, {}
    for name in sorted(clips):
        others = kept if is_same else references
        tenth = round(clips[name].duration * 10)
        twins = [other for other in others if not others[other].error
                 and abs(round(others[other].duration * 10) - tenth) <= 1
                 and filters.clip_distance(clips[name], others[other]) <= 60]  # fmt: skip
        if twins:
            wanted[name] = set(twins)
        elif is_same:
            kept[name] = clips[name]
    found = filters.find_copies(clips, references, max_distance=60)
    assert found.keys() == wanted.keys() and 5 < len(found) < 60
    assert all(found[name].of in wanted[name] for name in found)


def test_several_readers_see_what_one_sees(tmp_path):
    names = [f"{k}.mp4" for k in range(7)]
    for k, name in enumerate(names):
        write_video(tmp_path / name, world.render(scene(k)), world.FPS)
    (tmp_path / "torn.mp4").write_bytes(b"no video")
    names.insert(3, "torn.mp4")

    def embed(frames):
        return torch.from_numpy(frames.mean(axis=(1, 2)))

    one, three = (inspect_clips(tmp_path, names, embed, timeout_s=60, num_readers=number)
                  for number in (1, 3))  # fmt: skip
    assert list(one) == list(three) == names and one["torn.mp4"].error == three["torn.mp4"].error
    for name in set(names) - {"torn.mp4"}:
        assert one[name].digest == three[name].digest
        assert np.array_equal(one[name].signature, three[name].signature)
        assert torch.equal(one[name].embeddings, three[name].embeddings)


def test_a_stopped_run_decodes_no_clip_twice(tmp_path, vision_dir, monkeypatch):
    """Nor does it take the facts of other bytes, of other frames, or without embeddings."""
    names = ["a.mp4", "b.mp4", "torn.mp4"]
    for name in names[:2]:
        write_video(tmp_path / name, world.render(scene(len(name) + ord(name[0]))), world.FPS)
    (tmp_path / "torn.mp4").write_bytes(b"no video")
    decoded, decode = [], clip_facts.sample_frames_within
    monkeypatch.setattr(clip_facts, "sample_frames_within",
                        lambda _, path, **k: decoded.append(path.name) or decode(_, path, **k))

    def embed(frames):
        return torch.from_numpy(frames.mean(axis=(1, 2)))

    def look(names, embed=embed, num_frames=16):
        decoded.clear()
        kept = KeptFacts(tmp_path / "kept", vision_dir)
        return inspect_clips(tmp_path, names, embed, num_frames, kept=kept)

    look(names[:1])
    first = look(names)
    assert decoded == ["b.mp4", "torn.mp4"]
    again = look(names)
    assert decoded == ["torn.mp4"] and again["torn.mp4"] == first["torn.mp4"]
    for name in names[:2]:
        assert np.array_equal(again[name].signature, first[name].signature)
        assert torch.equal(again[name].embeddings, first[name].embeddings)
        assert (again[name].duration, again[name].digest, again[name].error) == (
            first[name].duration, first[name].digest, "")  # fmt: skip
    for changed in (dict(embed=None), dict(num_frames=8)):
        look(names[:1], **changed)
        assert decoded == ["a.mp4"], changed
    (tmp_path / "a.mp4").write_bytes((tmp_path / "b.mp4").read_bytes())
    assert look(names[:1])["a.mp4"].digest == first["b.mp4"].digest and not decoded
    file = KeptFacts(tmp_path / "kept", vision_dir).file_of(tmp_path / "b.mp4", 16, True)
    file.write_bytes(file.read_bytes()[:100])  # the power went
    look(names[1:2])
    assert decoded == ["b.mp4"]


def test_facts_that_another_encoder_found_are_removed(tmp_path, vision_dir, llm_dir):
    folder = KeptFacts(tmp_path, vision_dir).folder
    folder.mkdir(parents=True)
    assert KeptFacts(tmp_path, vision_dir).folder == folder and folder.is_dir()
    assert KeptFacts(tmp_path, llm_dir).folder != folder and not folder.parent.exists()


def test_leaks_are_copies_of_held_out_clips_and_held_out_clips_may_repeat(tmp_path, facts):
    held = {"x.mp4": write(tmp_path / "x.mp4", scene(2), crf=30), "y.mp4": facts["4.mp4"]}
    found = filters.find_copies(facts, held, max_distance=80)
    assert found == {"2.mp4": ("x.mp4", "encoded again"), "4.mp4": ("y.mp4", "exact")}


# ---- annotations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [*defects.SHORT_CAPTIONS, "red circle " * 6, "a b a b a b a b a b"]
)
def test_bad_captions_go(text):
    keep, reason = filters.is_good_caption(text, 4, 80, 0.5)
    assert not keep and reason


def test_a_caption_of_three_alike_things_is_no_loop():
    text = (
        "A small white circle stays still, a small white cross stays still and a small white "
        "square stays still."
    )
    assert filters.is_good_caption(text, 4, 80, 0.5) == (True, "")


def test_malformed_conversations_go_with_their_reason():
    good = {
        "id": "7",
        "video": "a.mp4",
        "conversations": [
            {"from": "human", "value": "<video>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
        ],
    }
    assert filters.is_well_formed(good) == (True, "")
    assert filters.caption_of(good) == "A cat."
    rng = np.random.default_rng(0)
    broken = {json.dumps(b): b for b in (defects.malform(good, rng) for _ in range(60))}
    assert len(broken) == 5  # every way of breaking it
    for sample in broken.values():
        keep, reason = filters.is_well_formed(sample)
        assert not keep and "7" in reason


def test_outliers_are_measured_by_the_pool_itself():
    values = {str(i): v for i, v in enumerate([1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 9.0, -9.0])}
    low, high = np.quantile(list(values.values()), [0.25, 0.75])
    assert high + 6 * (high - low) == pytest.approx(2.625)
    assert list(filters.find_outliers(values, "above", 6)) == ["6"]
    assert list(filters.find_outliers(values, "below", 6)) == ["7"]
    scaled = {k: 1000 * v for k, v in values.items()}
    assert list(filters.find_outliers(scaled, "above", 6)) == ["6"]
    assert filters.find_outliers({}, "above", 6) == {}
    two_kinds = {str(i): v for i, v in enumerate([1.0, 1.1, 1.2] * 10 + [2.2, 2.3] * 10 + [5.1])}
    assert list(filters.find_outliers(two_kinds, "above", 1.5)) == ["50"]
    with pytest.raises(ValueError, match="sideways"):
        filters.find_outliers(values, "sideways", 6)


# ---- models ---------------------------------------------------------------------------------


class Words:
    """A tokenizer of a few words."""

    eos_token = "<e> "

    def __call__(self, text):
        vocabulary = ["<e>", "a", "red", "circle", "moves", "left"]
        ids = [vocabulary.index(word) for word in text.split()]
        return type("Encoded", (), {"input_ids": ids})


def test_losses_do_not_depend_on_the_batch_and_equal_the_model_s_own(monkeypatch):
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    llm = Qwen2ForCausalLM(config).eval()
    texts = {"x": "a red circle moves left", "y": "red", "z": "moves moves a", "blank": "  "}
    together = filters.text_losses(texts, llm, Words(), batch_size=3)
    alone = filters.text_losses(texts, llm, Words(), batch_size=1)
    monkeypatch.setattr(filters, "MAX_CHARACTERS", 2 * max(map(len, texts.values())))
    few = filters.text_losses(texts, llm, Words(), batch_size=3)
    assert few == pytest.approx(alone, rel=1e-4)
    assert together.keys() == {"x", "y", "z"}
    ids = torch.tensor([[0, 1, 2, 3, 4, 5]])
    assert together["x"] == pytest.approx(llm(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
    assert together == pytest.approx(alone, abs=1e-5)


class Colours:
    """A stand-in for SigLIP: the text "red" points along the first axis, "blue" along the third."""

    device = "cpu"
    config = type("C", (), {"text_config": type("T", (), {"max_position_embeddings": 2})})

    def get_text_features(self, input_ids):
        return torch.eye(3)[input_ids]

    def __call__(self, texts, **_):
        ids = torch.tensor([["red", "green", "blue"].index(t) for t in texts])
        return type("Encoded", (), {"input_ids": ids})


def test_agreement_takes_the_first_sentence_and_the_best_frame():
    red_then_dark = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    clips = {"a": ClipFacts(embeddings=red_then_dark), "b": ClipFacts(embeddings=red_then_dark)}
    captions = {"a": "Red. Then blue.", "b": "Blue!"}
    assert filters.text_agreement(clips, captions, Colours(), Colours()) == {"a": 1.0, "b": 0.0}
    assert filters.canonical_text("A Red, small  circle.") == "a red, small circle"


# ---- the funnel and its score ---------------------------------------------------------------


def test_funnel_counts_what_each_filter_leaves_and_refuses_a_repeated_id():
    pools = {"captions": [{"id": "a", "video": "1"}, {"id": "b", "video": "2"}],
             "qa": [{"id": "c", "video": "1"}]}  # fmt: skip
    row = Funnel(pools)
    assert row.apply("first", lambda s: (s["video"] != "1", "one")) == 2
    assert row.apply("second", lambda s: (False, "all"), ["qa"]) == 0
    assert row.removed == {"first": {"a": "one", "c": "one"}, "second": {}}
    assert row.steps[-1] == ("second", {"captions": 1, "qa": 0})
    assert row.videos() == ["2"] and len(pools["qa"]) == 1
    with pytest.raises(ValueError, match="'a' occurs 2 times"):
        Funnel({"x": [{"id": "a"}, {"id": "a"}]})


@pytest.mark.parametrize("sample, message", [
    ("x", "qa: #1: 'x' is no JSON object"), ({}, "qa: #1: id = None must be a text"),
    ({"id": 3}, "qa: #1: id = 3 must be a text"),
    ({"id": "b", "video": ["1", "2"]}, r"qa: #1: video = \['1', '2'\] must be .* single clips"),
])  # fmt: skip
def test_a_sample_that_no_filter_could_look_at_is_named(sample, message):
    with pytest.raises(ValueError, match=message):
        Funnel({"qa": [{"id": "a", "video": "1"}, sample]})


def test_every_sample_gets_an_id_of_its_own_and_the_first_keeps_what_it_had():
    pools = {"captions": [{"id": "a"}, {"id": "a", "video": "1"}],
             "qa": [{"id": "a"}, {}, {"id": 7}]}  # fmt: skip
    named, count = with_ids(pools)
    assert [s["id"] for s in named["captions"]] == ["a", "captions#1"]
    assert [s["id"] for s in named["qa"]] == ["qa#0", "qa#1", "qa#2"] and count == 4
    assert named["captions"][1]["video"] == "1" and pools["qa"][1] == {}  # nothing else changes
    assert with_ids(named) == (named, 0)
    Funnel(named)
    merged, _ = with_ids({"qa": [{}, {"id": "qa#0"}, {"id": "qa#0'"}]})
    assert [s["id"] for s in merged["qa"]] == ["qa#0''", "qa#0", "qa#0'"]
    assert with_ids({"qa": ["x"]}) == ({"qa": ["x"]}, 0)  # what is no sample the funnel refuses


def test_score_counts_own_kinds_and_lets_either_twin_stay():
    truth = {
        "copy1": {"kind": "duplicate", "twin": "orig1"},
        "copy2": {"kind": "near_duplicate", "twin": "orig2"},
        "still": {"kind": "static", "twin": None},
        "wrong": {"kind": "wrong_caption", "twin": None},
    }
    removed = {
        "motion": {"still": "", "moving": ""},
        "duplicates": {"orig1": ""},
        "agreement": {"wrong": ""},
    }
    scores = funnel.score_filters(removed, truth)
    assert scores["motion"] == {"removed": 2, "precision": 0.5, "planted": 1, "recall": 1.0}
    assert scores["duplicates"] == {"removed": 1, "precision": 1.0, "planted": 2, "recall": 0.5}
    assert scores["agreement"]["recall"] == 1.0
    assert scores["overall"] == {"removed": 4, "precision": 0.75, "planted": 4, "recall": 0.75}


def test_a_copy_that_stayed_is_clean_afterwards():
    truth = {"copy": {"kind": "duplicate", "twin": "orig"}}
    removed = {"duplicates": {"orig": ""}, "agreement": {"copy": ""}}
    scores = funnel.score_filters(removed, truth)
    assert scores["duplicates"]["precision"] == 1.0 and scores["agreement"]["precision"] == 0.0


def test_every_planted_kind_is_some_filter_s_business():
    kinds = [kind for kinds in funnel.CATCHES.values() for kind in kinds]
    assert sorted(kinds) == sorted(defects.KINDS)
