"""Scorers of published benchmarks against their golden tables."""

import pytest

from tlv.scorers import (
    normalise_vqa,
    parse_letter,
    parse_mme,
    parse_science,
    parse_yes_no,
    score_mme,
    score_pope,
    score_vqa,
)


@pytest.mark.parametrize(
    "text, wanted",
    [("NO", "yes"), ("nope", "yes"), ("", "yes"), ("No, there is no dog.", "no"),
     ("Yes, not sure", "no"), ("Yes. There is no cat.", "yes")],
)  # fmt: skip
def test_pope_reads_answers_as_published(text, wanted):
    assert parse_yes_no(text) == wanted


def test_pope_numbers():
    answers = ["yes"] * 3 + ["no"] + ["yes"] + ["no"] * 3
    scores = score_pope(answers, ["yes"] * 4 + ["no"] * 4)
    assert scores == pytest.approx(
        {"accuracy": 0.75, "precision": 0.75, "recall": 0.75, "f1": 0.75, "yes_ratio": 0.5},
        abs=1e-5,
    )
    assert score_pope(["yes"], ["no"])["f1"] == 0.0  # no division by nothing
    with pytest.raises(ValueError):
        score_pope(["yes"], [])


@pytest.mark.parametrize(
    "text, wanted",
    [("the U.S.A.", "usa"), ("St. John's", "st john 's"), ("it's", "it 's"), ("7/11", "7 11"),
     ("3,000", "3000"), ("$5.00", "$5.00"), ("none", "0"), ("what?s", "what's"), ("ten.", "10")],
)  # fmt: skip
def test_vqa_answers_are_normalised_as_published(text, wanted):
    assert normalise_vqa(text) == wanted


@pytest.mark.parametrize("same, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_counts_annotators(same, score):
    truths = ["Red."] * same + ["blue"] * (10 - same)
    assert score_vqa("the red", truths) == pytest.approx(score)


def test_vqa_accuracy_needs_ten_annotators():
    with pytest.raises(ValueError, match="9 annotators' answers; .* 10"):
        score_vqa("red", ["red"] * 9)


@pytest.mark.parametrize(
    "text, wanted",
    [("B", "B"), ("F", None), ("C. a cat", "C"), ("The answer is D.", "D"), ("b", None), ("", None),
     ("The answer is A. The answer is B.", None), ("I think B", None), ("AB", None)],
)  # fmt: skip
def test_science_answers(text, wanted):
    assert parse_science(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [("Yes.", "yes"), (" NO ", "no"), ("y", "yes"), ("n", "no"), ("Yes, it is", "yes"),
     ("maybe", "other"), ("It is not", "other"), ("", "other")],
)  # fmt: skip
def test_mme_answers(text, wanted):
    assert parse_mme(text) == wanted


def test_mme_scores():
    records = [("color", "a", "Yes", "yes"), ("color", "a", "No", "no"),
               ("color", "b", "Yes", "yes"), ("color", "b", "No", "yes"),
               ("code_reasoning", "c", "Yes", "no"), ("code_reasoning", "c", "No", "no")]
    scores = score_mme(records)  # fmt: skip
    assert scores["color"] == scores["perception"] == 75 + 50
    assert scores["code_reasoning"] == scores["cognition"] == 50
    with pytest.raises(ValueError, match="color: image 'a' has 1 questions; each has two"):
        score_mme(records[:1])


OPTIONS = ["a red cat", "a blue boat", "three dogs", "nothing"]


@pytest.mark.parametrize(
    "text, wanted",
    [("Answer: B", "A"), ("Cannot tell", "C"), ("Both dogs run", "B"), ("**B**", None),
     ("b", None), ("two dogs", None), ("The answer is (C).", "C"), ("", None), ("B", "B"),
     ("It may be (A) or rather (D)", "D"), ("so it must be a blue boat here", "B")],
)  # fmt: skip
def test_letters_by_the_published_rule(text, wanted):
    assert parse_letter(text, OPTIONS) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [("Answer: B", "B"), ("B. a blue boat", None), ("Cannot tell", None), ("It is B", "B")],
)
def test_letters_by_the_rule_of_mmmu(text, wanted):
    assert parse_letter(text, OPTIONS, first_letter=False) == wanted
