"""Rules of published benchmarks: letters, frames, scores, against their golden tables."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tlv.benchmarks import (
    gqa,
    llava_wild,
    mlvu,
    mm_vet,
    mmbench,
    mme,
    mmmu,
    mmvu,
    mvbench,
    pope,
    science_qa,
    text_vqa,
)
from tlv.benchmarks.letters import ask_letter, parse_letter, score_letters
from tlv.benchmarks.longvideobench import interleave
from tlv.benchmarks.question import BenchmarkError, Question
from tlv.benchmarks.run import BENCHMARKS, find
from tlv.benchmarks.sampling import each_once, frames_of, left_steps, segment_midpoints
from tlv.benchmarks.vqa import CONTRACTIONS, normalise_vqa, score_vqa
from tlv.video import Clip, sample_indices


def asked(*rows) -> list[Question]:
    """Questions from (id, answer, options, group, media); the last ones may be left out."""
    names = ("id", "answer", "options", "group", "media")
    return [Question(**{"prompt": "?", "media": None, **dict(zip(names, row, strict=False))})
            for row in rows]  # fmt: skip


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    assert len(BENCHMARKS) == 15 and find("pope") is pope
    with pytest.raises(ValueError, match="'POPE' is unknown; known are gqa, llava_wild, .*vqa_v2"):
        find("POPE")


def test_each_reads_and_is_scored_or_says_what_to_upload():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.MAX_NEW_TOKENS in (128, 1024), name
        assert any(hasattr(benchmark, how) for how in ("score", "upload", "score_judged")), name
        assert "Reads " in benchmark.__doc__, f"{name} does not say which files it reads"


# ---- which frames ---------------------------------------------------------------------------


def test_frames_of_mvbench():
    wanted = [9, 28, 46, 65, 84, 102, 121, 140, 159, 177, 196, 215, 233, 252, 271, 289]
    assert segment_midpoints(300, 30.0).tolist() == wanted
    cut = segment_midpoints(60, 3.0, bound=(2, 8), first=1)
    assert cut.tolist() == [6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23]
    for total in (1, 2, 15, 16, 17, 1000):
        whole = segment_midpoints(total, 25.0)
        assert 0 <= whole.min() <= whole.max() < total
    assert mvbench.TASKS["fine_grained_pose"] in mvbench.BY_SEGMENT and len(mvbench.TASKS) == 20


def test_frames_of_longvideobench():
    assert left_steps(10.4, 30.0).tolist() == [31 * i for i in range(10)]
    assert left_steps(100.0, 30.0).tolist() == [187 * i for i in range(16)]
    assert left_steps(0.3, 30.0).tolist() == [0]
    assert len(left_steps(10.0, 29.97)) == 10  # 299 frames, which are 9.98 s


def test_frames_of_video_mme_and_mlvu_are_shown_once():
    indices = sample_indices(10, 16)
    assert indices.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9]
    frames = np.arange(10, dtype=np.uint8)[indices, None, None, None]
    clip = Clip(frames, indices, indices / 8, 10, 8.0, 1.25)
    assert each_once(clip).ravel().tolist() == list(range(10))


def test_how_many_frames_is_the_models():
    processor = SimpleNamespace(sampling="uniform", num_frames=16, fps=1.0, max_frames=64)
    assert frames_of(processor)(30, 30.0) == 16
    processor.sampling = "fps"  # published models "1fps": one a second, from 1 to max_frames
    assert [frames_of(processor)(30 * s, 30.0) for s in (0.5, 10, 100)] == [1, 10, 64]


def test_subtitles_stand_after_the_frames_before_their_middle():
    lines = [
        {"timestamp": [1.0, 3.0], "text": "one"},  # frames 1, 2 and 3 come before its middle
        {"timestamp": [3.1, 3.2], "text": "short"},  # widened to a second
        {"timestamp": [8.0, 8.5], "text": "unseen"},  # no frame falls in it
    ]
    told = interleave([0.0, 1.5, 2.0, 3.0, 6.0], lines, 0.0, 10.0)
    assert told == ["[image]"] * 3 + ["one", "[image]", "short", "[image]"]
    clock = [{"start": "00:01:02.500", "end": "00:01:04.500", "line": "late"}]
    assert interleave([3.0], clock, 60.0, 10.0) == ["[image]", "late"]
    endless = [{"timestamp": [1.0, None], "text": "to the end"}]
    assert interleave([2.0, 9.0], endless, 0.0, 10.0) == ["[image]", "to the end", "[image]"]


# ---- letters --------------------------------------------------------------------------------

OPTIONS = ["a red cat", "a blue boat", "three dogs", "nothing"]


def test_the_published_form_of_a_choice():
    request = "Answer with the option's letter from the given choices directly."
    assert ask_letter("Who?", ["I", "you"]) == f"Who?\n(A) I\n(B) you\n{request}"
    assert ask_letter("Who?", ["I", "you"], "{}. {}") == f"Who?\nA. I\nB. you\n{request}"


@pytest.mark.parametrize(
    "text, wanted",
    [("Answer: B", "A"), ("Cannot tell", "C"), ("Both dogs run", "B"), ("**B**", None),
     ("b", None), ("two dogs", None), ("The answer is (C).", "C"), ("", None), ("B", "B"),
     ("It may be (A) or rather (D)", "D"), ("so it must be a blue boat here", "B")],
)  # fmt: skip
def test_letters_by_the_published_rule(text, wanted):
    assert parse_letter(text, OPTIONS) == wanted


def test_an_option_without_words_is_in_no_answer():
    assert parse_letter("it is a red cat or so", ["a red cat", ""], first_letter=False) == "A"
    assert parse_letter("it is none of them at all", ["a red cat", " "], first_letter=False) is None


@pytest.mark.parametrize(
    "text, wanted, strict",
    [("Answer: B", "B", "B"), ("B. a blue boat", None, "B"), ("Cannot tell", None, None),
     ("It is B", "B", "B"), ("(A) or C.", "A", "A")],
)  # fmt: skip
def test_letters_by_the_rule_of_mmmu(text, wanted, strict):
    assert parse_letter(text, OPTIONS, first_letter=False) == wanted
    assert parse_letter(text, OPTIONS, first_letter=False, strict=True) == strict


def test_an_answer_without_a_letter_is_wrong_and_counted():
    questions = asked(*((str(i), "A", OPTIONS, "ab"[i // 2]) for i in range(4)))
    scores = score_letters(questions, ["A", "B", "", "A."])
    assert scores == {"accuracy": 0.5, "accuracy/a": 0.5, "accuracy/b": 0.5, "unparsed_rate": 0.25}


def test_mlvu_averages_tasks_and_mvbench_questions():
    questions = asked(*((str(i), "A", OPTIONS, "1_plotQA" if i else "4_count") for i in range(4)))
    answers = ["A", "B", "B", "B"]
    assert mlvu.score(questions, answers)["m_avg"] == 0.5
    assert mvbench.score(questions, answers)["accuracy"] == 0.25


def test_mmvu_reads_letters_and_substrings_together():
    questions = asked(("0", "A", OPTIONS, "multiple-choice"), ("1", "Red Cell", (), "open-ended"),
                      ("2", "x", (), "open-ended"), ("3", "y", (), "open-ended"))  # fmt: skip
    scores = mmvu.score(questions, ["A", "a red cell.", "", "it"])
    assert scores == {"accuracy": 0.5, "accuracy/multiple-choice": 1.0,
                      "accuracy/open-ended": 1 / 3, "unparsed_rate": 0.0}  # fmt: skip
    assert mmvu.score(questions, ["none", "", "", ""])["unparsed_rate"] == 1.0


@pytest.mark.parametrize(
    "text, wanted",
    [("B", "B"), ("B.", "B"), ("(C)", "C"), ("Answer: D", "D"), ("The answer is (A).", "A"),
     ("A or B", None), ("A cat", "A"), ("A cat or two boats", None), ("it is A blue boat", "B"),
     ("three dogs", "C"), ("three dogs, nothing", None), ("", None), ("Answer:B", None)],
)  # fmt: skip
def test_letters_by_the_rule_of_mmbench(text, wanted):
    assert mmbench.parse_choice(text, OPTIONS) == wanted


def test_mmbench_wants_every_rotation():
    questions = asked(("7", "A", OPTIONS, "x"), ("1000007", "B", OPTIONS, "x"),
                      ("8", "A", OPTIONS, "y"), ("1000008", "D", OPTIONS, "y"))  # fmt: skip
    scores = mmbench.score(questions, ["A", "B", "A", "A"])
    assert scores == {"accuracy": 0.5, "accuracy/x": 1.0, "accuracy/y": 0.0,
                      "accuracy/one_rotation": 0.75, "unparsed_rate": 0.0}  # fmt: skip


# ---- POPE and MME ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wanted",
    [("NO", "yes"), ("nope", "yes"), ("", "yes"), ("No, there is no dog.", "no"),
     ("Yes, not sure", "no"), ("Yes. There is no cat.", "yes")],
)  # fmt: skip
def test_pope_reads_answers_as_published(text, wanted):
    assert pope.parse_yes_no(text) == wanted


def test_pope_numbers():
    answers = ["yes"] * 3 + ["no"] + ["yes"] + ["no"] * 3
    truths = ["yes"] * 4 + ["no"] * 4
    wanted = {"accuracy": 0.75, "precision": 0.75, "recall": 0.75, "f1": 0.75, "yes_ratio": 0.5}
    assert pope.score_list(answers, truths) == pytest.approx(wanted, abs=1e-5)
    assert pope.score_list(["yes"], ["no"])["f1"] == 0.0  # no division by nothing
    questions = asked(*((str(i), truth, (), "random") for i, truth in enumerate(truths)),
                      ("8", "no", (), "popular"))  # fmt: skip
    scores = pope.score(questions, [*answers, "no"])
    assert scores["f1/random"] == pytest.approx(0.75, abs=1e-5) and scores["f1/popular"] == 0
    assert scores["accuracy"] == 0.875 and scores["f1"] == pytest.approx(0.375, abs=1e-5)


@pytest.mark.parametrize(
    "text, wanted",
    [("Yes.", "yes"), (" NO ", "no"), ("y", "yes"), ("n", "no"), ("Yes, it is", "yes"),
     ("maybe", "other"), ("It is not", "other"), ("", "other")],
)  # fmt: skip
def test_mme_answers(text, wanted):
    assert mme.parse_mme(text) == wanted


def test_mme_scores():
    questions = asked(*(("", truth, (), subtask, picture) for subtask, picture in
                        (("color", "a"), ("color", "b"), ("code_reasoning", "c"))
                        for truth in ("Yes", "No")))  # fmt: skip
    scores = mme.score(questions, ["yes", "no", "yes", "yes", "no", "no"])
    assert scores["color"] == scores["perception"] == 75 + 50
    assert scores["code_reasoning"] == scores["cognition"] == 50
    with pytest.raises(BenchmarkError, match="'a' has 1 questions; each has two, and a --limit"):
        mme.score(questions[:1], ["yes"])


# ---- short and open answers -----------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wanted",
    [("the U.S.A.", "usa"), ("St. John's", "st john 's"), ("it's", "it 's"), ("7/11", "7 11"),
     ("3,000", "3000"), ("$5.00", "$5.00"), ("none", "0"), ("what?s", "what's"), ("ten.", "10")],
)  # fmt: skip
def test_vqa_answers_are_normalised_as_published(text, wanted):
    assert normalise_vqa(text) == wanted


def test_contractions_lack_one_apostrophe():
    assert CONTRACTIONS["dont"] == "don't" and CONTRACTIONS["ow's'at"] == "'ow's'at"
    assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've"
    assert len(CONTRACTIONS) == 114 and not {"im", "ive", "couldntve"} & set(CONTRACTIONS)


@pytest.mark.parametrize("same, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_counts_annotators(same, score):
    truths = ["Red."] * same + ["blue"] * (10 - same)
    assert score_vqa("the red", truths) == pytest.approx(score)
    both = text_vqa.score(asked(("0", truths), ("1", ["x"] * 10)), ["red", "x"])
    assert both["accuracy"] == pytest.approx((score + 1) / 2)


def test_vqa_accuracy_needs_ten_annotators():
    with pytest.raises(ValueError, match="9 annotators' answers; .* 10"):
        score_vqa("red", ["red"] * 9)


@pytest.mark.parametrize(
    "prompt",
    ["OCR tokens: stop. Question: What Sign? Short answer:",
     "What Sign?\nReference OCR token: stop\nAnswer in a word.",
     "Reference OCR token: stop\nWhat Sign?\nAnswer in a word.", "What Sign?\nAnswer in a word."],
)  # fmt: skip
def test_textvqa_finds_the_question_in_each_of_its_four_shapes(prompt):
    assert text_vqa.find_question(prompt) == "what sign?"
    with pytest.raises(BenchmarkError, match="has none of TextVQA's four shapes"):
        text_vqa.find_question(prompt.replace("\n", " ").replace("Short", ""))


def test_gqa_is_exact_but_for_case_and_a_full_stop():
    assert gqa.score(asked(*((str(i), "red") for i in range(4))), ["Red.", "red", "a red", ""]) == {
        "accuracy": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    "text, wanted",
    [("B", "B"), ("F", None), ("C. a cat", "C"), ("The answer is D.", "D"), ("b", None), ("", None),
     ("The answer is A. The answer is B.", None), ("I think B", None), ("AB", None),
     ("The answer is B, since it flies", "B"), ("The answer is B", None)],
)  # fmt: skip
def test_science_answers(text, wanted):
    assert science_qa.parse_science(text) == wanted


def test_science_counts_pictures_apart():
    questions = asked(("0", "B", OPTIONS, "img"), ("1", "A", OPTIONS, "img"),
                      ("2", "A", OPTIONS, "text"))  # fmt: skip
    assert science_qa.score(questions, ["B", "no", "A"]) == {
        "accuracy": 2 / 3, "accuracy/img": 0.5, "unparsed_rate": 1 / 3}  # fmt: skip


@pytest.mark.parametrize(
    "text, truth, wanted",
    [("The answer is 3,000.", "3000", True), ("so x = 2.504", "2.5", True), ("", "3", False),
     ("It is Paris", "paris", True), ("7", ["seven", "7"], True), ("1.2e3", "1200", True),
     ("It is 31", "3", False), ("a", "a", True), ("cat", "a", False),
     ("Thus the result is b or c", "c", True),
     ("It is red so \nI think", "red", True)],
)  # fmt: skip
def test_open_answers_by_the_rule_of_mmmu(text, truth, wanted):
    assert mmmu.is_right(mmmu.parse_open(text), truth) == wanted


def test_mmmu_scores_both_kinds():
    questions = asked(("0", "B", OPTIONS, "choice"), ("1", "B", OPTIONS, "choice"),
                      ("2", "4", (), "open"))  # fmt: skip
    answers = ["It is B", "B. a blue boat", "4"]
    assert mmmu.score(questions, answers) == {
        "accuracy": 2 / 3, "accuracy/strict": 1.0, "accuracy/choice": 0.5, "accuracy/open": 1.0,
        "unparsed_rate": 0.5}  # fmt: skip
    assert mmmu.upload(None, questions, answers) == {"0": "B", "1": "", "2": "4"}


# ---- what a judge says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, value",
    [("0.5", 0.5), (1, 1.0), ("0.0 | because", 0.0), ("1.0\n", 1.0), ("1.5", None), ("good", None),
     ("", None), ("10", None), ("1/10", None), ("1 out of 10", None), ("0.8. good", 0.8),
     (1e-05, 1e-05), ("1e-05", None), ("0.85/1", None), (7, None), ("1.5.2", None),
     ("1%", None), ("1,0", None), ("1-2", None), ("1 (of 10)", None), ("1E-3", None),
     ("0.8 (mostly right)", 0.8), ("0.5, for its first half", 0.5)],
)  # fmt: skip
def test_scores_of_a_judge(said, value):
    assert mm_vet.parse_score(said) == value


@pytest.fixture
def judged(tmp_path):
    """judged(what a judge said) -> its file."""

    def write(said):
        (tmp_path / "judged.json").write_text(json.dumps(said))
        return tmp_path / "judged.json"

    return write


def test_mm_vet_by_capability_and_combination(judged):
    questions = asked(("v1_0", None, (), "rec,ocr"), ("v1_1", None, (), "rec"))
    scores = mm_vet.score_judged(questions, judged({"v1_0": "1.0", "v1_1": 0.4}))
    assert scores == pytest.approx({"total": 70, "rec": 70, "ocr": 100, "only/rec,ocr": 100,
                                    "only/rec": 40})  # fmt: skip
    runs = {"v1_0": {"score": [1.0, 0.6]}, "v1_1": {"score": [0.4]}}  # as its evaluator writes them
    assert mm_vet.score_judged(questions, judged(runs))["ocr"] == pytest.approx(80)
    with pytest.raises(BenchmarkError, match="word on v1_1 is None; a score from 0.0 to 1.0 is"):
        mm_vet.score_judged(questions, judged({"v1_0": 1}))


def test_llava_wild_is_relative_to_the_reference(judged):
    reviews = [{"category": "llava_bench_conv", "tuple": [8, 4]},
               {"category": "llava_bench_complex", "tuple": [10, 9]}]  # fmt: skip
    scores = llava_wild.score_judged(asked(("0",), ("1",)), judged(reviews))
    assert scores == pytest.approx({"overall": 100 * 13 / 18, "conv": 50, "complex": 90})
    with pytest.raises(BenchmarkError, match="1 reviews of 2 questions"):
        llava_wild.score_judged(asked(("0",), ("1",)), judged(reviews[:1]))
    with pytest.raises(BenchmarkError, match=r"review 0: tuple = \[-1, -1\]; two scores from 1"):
        llava_wild.score_judged(asked(("0",)), judged([{"category": "x", "tuple": [-1, -1]}]))
