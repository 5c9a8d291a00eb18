"""Reading of answers, intervals and baselines; and that batching changes no answer."""

import json
from collections import Counter

import numpy as np
import pytest

from tlv import answering, evaluate
from tlv.answering import Answer
from tlv.evaluate import extract_choice
from tlv.intervals import clustered_interval
from tlv.mp4 import write_video

OPTIONS = ["red", "blue", "a green circle", "none of these"]


def question(name, video="a.mp4", kind="colour", form="free", answer="red", options=(),
             unseen=False):  # fmt: skip
    return {"id": name, "video": video, "type": kind, "form": form, "answer": answer,
            "question": f"What colour is it, {name}?", "options": list(options),
            "unseen_pair": unseen}  # fmt: skip


# ---- reading an answer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), (" b. ", "B"), ("(C)", "C"), ("[c]", "C"), ("C)", "C"),
        ("**B**", "B"), ("`D`", "D"), ("A", "A"), ("A.", "A"), ('"B"', "B"),
        ("Answer: B", "B"), ("answer:b", "B"), ("Answer: (B)", "B"), ("**Answer:** C", "C"),
        ("The answer is (C).", "C"), ("The answer is C", "C"), ("the correct option is b", "B"),
        ("The answer is A.", "A"), ("The answer is B because it is blue", "B"),
        ("A. red", "A"), ("B) blue", "B"), ("b. blue", "B"), ("(D) none of these", "D"),
        ("red", "A"), ("Blue.", "B"), ("red (A)", "A"), ("red (B)", "B"),
        ("the green circle", "C"), ("I would say B", "B"),
        ("(A) is wrong, the answer is B", "B"), ("Answer: D\n", "D"),
        # nothing to read, or not one thing only
        ("", ""), ("   ", ""), ("Cannot tell", ""), ("Both dogs run", ""), ("A red circle", ""),
        ("two dogs", ""), ("B and C", ""), ("A or B?", ""), ("A. red B. blue", ""), ("E", ""),
        ("The answer is a dog", ""), ("Answer the question", ""), ("Bridges", ""), ("42", ""),
    ],
)  # fmt: skip
def test_extract_choice(text, letter):
    assert extract_choice(text, OPTIONS) == letter


def test_extract_choice_knows_how_many_options_there_are():
    assert extract_choice("C", ["yes", "no"]) == ""
    assert extract_choice("C", ["x", "y", "z"]) == "C"
    assert extract_choice("same", ["same", "Same."]) == ""


def test_normalise_forgives_form_and_nothing_else():
    assert evaluate.exact_match("The  Red circle.", "red circle")
    assert evaluate.exact_match("2", "two")
    assert not evaluate.exact_match("red circles", "red circle")
    assert not evaluate.exact_match("not red", "red")
    assert not evaluate.exact_match("", "red")


def test_unparsed_and_broken_answers_are_wrong_and_counted():
    asked = [question("1", form="choice", answer="A", options=OPTIONS), question("2")]
    records = evaluate.make_records(asked, [Answer("no idea"), Answer("", error="cut")], "video")
    assert [r["correct"] for r in records] == [False, False]
    assert records[0]["filtered_resps"] == [""] and records[1]["error"] == "cut"
    json.dumps(records)


# ---- intervals ------------------------------------------------------------------------------


def test_interval_equals_wilson_when_every_answer_has_its_own_clip():
    low, high = clustered_interval([1] * 8 + [0] * 2, range(10))
    # Wilson's interval for 8 of 10, at an effective number close to 10 (9: the variance's n - 1).
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=0.02)


def test_interval_widens_when_answers_about_a_clip_agree():
    correct = np.repeat([1, 0] * 20, 5)
    clips = np.repeat(range(40), 5)
    low, high = clustered_interval(correct, clips)
    free_low, free_high = clustered_interval(correct, range(200))
    assert high - low == pytest.approx(np.sqrt(5) * (free_high - free_low), rel=0.05)
    few = clustered_interval(correct[::5], clips[::5])
    assert (low, high) == pytest.approx(few, abs=1e-9)  # repeating an answer adds nothing


def test_interval_covers_the_truth_in_95_of_100_clustered_samples():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        ability = rng.beta(6, 2, size=60)  # clips differ in how hard they are; mean 0.75
        correct = rng.random((60, 6)) < ability[:, None]
        low, high = clustered_interval(correct.ravel(), np.repeat(range(60), 6))
        hits += low <= 0.75 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_interval_at_the_edges_keeps_a_width_and_stays_inside():
    low, high = clustered_interval([1] * 30, np.repeat(range(10), 3))
    assert 0.6 < low < 0.8 and high == pytest.approx(1.0)
    assert clustered_interval([], []) == (0.0, 1.0)
    low, high = clustered_interval([0], ["a"])
    assert low == pytest.approx(0.0) and high < 1


# ---- baselines ------------------------------------------------------------------------------


def test_other_clip_is_never_the_own_one_and_each_is_used_once():
    asked = [question(str(i), video=f"{i // 3}.mp4") for i in range(21)]
    moved = answering.with_other_clip(asked, seed=0)
    assert all(a["video"] != b["video"] for a, b in zip(asked, moved, strict=True))
    assert Counter(q["video"] for q in moved) == Counter(q["video"] for q in asked)
    assert moved == answering.with_other_clip(asked, seed=0)
    with pytest.raises(ValueError, match="1 clip"):
        answering.with_other_clip(asked[:3], seed=0)


def test_majority_reads_letters_as_their_options_and_prefers_what_was_seen_most():
    choice = "What colour is it?\nA. red\nB. blue\nAnswer with the letter."
    turns = [("<video>\nWhat colour is the cross?", "Blue."), (choice, "B"), (choice, "A"),
             ("How many?", "two")]  # fmt: skip
    asked = [
        question("free"),
        question("pick", form="choice", options=["green", "red", "blue"]),
        {**question("new"), "question": "Why is it so?"},
    ]
    assert [a.text for a in evaluate.majority_answers(turns, asked)] == ["blue", "C", "blue"]


def test_summary_has_the_promised_keys_and_the_best_baseline():
    asked = [
        question("1"), question("2", video="b.mp4", answer="blue", unseen=True),
        question("4", video="c.mp4"),
        question("3", kind="count", form="choice", answer="B", options=["one", "two"]),
    ]  # fmt: skip
    given = {"video": ["red", "blue", "tan", "B"], "blind": ["red", "red", "blue", "?"],
             "other clip": ["blue", "red", "blue", "A"],
             "majority": ["red", "blue", "blue", "A"]}  # fmt: skip
    records = [
        record
        for name, texts in given.items()
        for record in evaluate.make_records(asked, [Answer(t) for t in texts], name)
    ]
    metrics = evaluate.summarise(records, seed=3)
    assert metrics["accuracy/free"] == 0.5 and metrics["accuracy/choice"] == 1.0
    assert metrics["accuracy/unseen_pairs"] == 1.0  # of question 2, which counts nowhere else
    assert metrics["accuracy/type/colour"] == 0.5
    assert metrics["baseline/type/colour"] == metrics["baseline/majority/colour"] == 0.5
    assert metrics["baseline/blind/colour"] == 0.5 and metrics["baseline/type/count"] == 0.0
    assert metrics["num_questions"] == 4 and metrics["seed"] == 3 and metrics["unparsed_rate"] == 0
    assert 0 < metrics["accuracy/free/low"] < metrics["accuracy/free/high"] <= 1
    assert all(isinstance(v, int | float) for v in metrics.values())
    with pytest.raises(ValueError, match="blind"):
        evaluate.summarise([r for r in records if r["condition"] != "blind"], seed=3)


def test_confusion_and_calibration():
    asked = [question("1"), question("2", answer="blue"), question("3")]
    given = [Answer("red", 0.95), Answer("red", 0.55), Answer("a dog", 0.15)]
    records = evaluate.make_records(asked, given, "video")
    labels, counts = evaluate.confusion(records, "colour")
    assert labels == ["blue", "red", "other"]
    assert counts.tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert evaluate.calibration_error(records) == pytest.approx((0.05 + 0.55 + 0.15) / 3)


# ---- the model ------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", rng.integers(0, 255, (6, 32, 32, 3), np.uint8), 8)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    return tmp_path


def test_answers_do_not_depend_on_the_batch_and_keep_the_order(tiny, clips):
    model, processor = tiny
    asked = [question(f"{i} {'very ' * (i % 3)}", video=v) for i, v in enumerate(
        ["b.mp4", "a.mp4", None, "bad.mp4", "b.mp4", "a.mp4", None])]  # fmt: skip
    options = dict(max_new_tokens=4)
    together = answering.generate_answers(model, processor, asked, clips, batch_size=7, **options)
    alone = answering.generate_answers(model, processor, asked, clips, batch_size=1, **options)
    shared = answering.generate_answers(
        model, processor, asked, clips, batch_size=1, num_processes=2, **options
    )
    assert shared == alone
    assert [a.text for a in together] == [a.text for a in alone]
    sure, again = [a.confidence for a in together], [a.confidence for a in alone]
    assert sure == pytest.approx(again, abs=1e-4)
    assert together[3].text == "" and "not a readable" in together[3].error
    assert all(0 < a.confidence <= 1 for i, a in enumerate(together) if i != 3)
    assert together[0] != together[2]  # the clip matters


def test_each_clip_is_decoded_once(tiny, clips, monkeypatch):
    model, processor = tiny
    decoded = Counter()
    read = processor.sample
    monkeypatch.setattr(
        processor, "sample", lambda path, *a: decoded.update([path.name]) or read(path, *a)
    )
    asked = [question(str(i), video=v) for i, v in enumerate(["a.mp4", "b.mp4"] * 3)]
    answering.generate_answers(model, processor, asked, clips, batch_size=2, max_new_tokens=1)
    assert decoded == {"a.mp4": 1, "b.mp4": 1}


def test_what_is_asked_alike_is_asked_once(tiny, clips, monkeypatch):
    model, processor = tiny
    pairs = [("a", None), ("b", "a.mp4"), ("a", None), ("a", "a.mp4"), ("b", "a.mp4")]
    asked = [question(text, video=v) for text, v in pairs]
    put, generate = [], answering._generate

    def watch(model, processor, rows, max_new_tokens):
        put.extend(rows)
        return generate(model, processor, rows, max_new_tokens)

    monkeypatch.setattr(answering, "_generate", watch)
    said = answering.generate_answers(model, processor, asked, clips, max_new_tokens=4)
    assert len(put) == 3 and len({(text, clip is None) for text, clip in put}) == 3
    assert said[0] == said[2] != said[3] and said[1] == said[4]
