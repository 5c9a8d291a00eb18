"""POPE: is there an object? Three lists of questions about pictures of COCO.

Reads llava_pope_test.jsonl (question_id, image, text, category), coco/coco_pope_{category}.json (a
line each, with `label`) and val2014/. Answers meet labels by their order within a category, as in
published code; here lists of different length are refused.
"""

from collections import Counter, defaultdict
from pathlib import Path

from tlv.benchmarks.question import BenchmarkError, Question, read_rows

MAX_NEW_TOKENS = 128
CATEGORIES = ("random", "popular", "adversarial")
EPSILON = 1e-6  # in the ratios


def read(folder: Path, num_frames=None) -> list[Question]:
    by_category, keys = defaultdict(list), ("question_id", "image", "text", "category")
    for row in read_rows(folder / "llava_pope_test.jsonl", keys):
        by_category[row["category"]].append(row)
    questions = []
    for category in CATEGORIES:
        path = folder / f"coco/coco_pope_{category}.json"
        rows, labels = by_category[category], read_rows(path, ("label",), lines=True)
        if len(rows) != len(labels):
            raise BenchmarkError(f"{path}: {len(labels)} labels for {len(rows)} questions of the "
                                 f"category {category!r}; both files must be of one version")
        questions += [
            Question(str(row["question_id"]), row["text"], f"val2014/{row['image']}",
                     label["label"], group=category)
            for row, label in zip(rows, labels, strict=True)
        ]  # fmt: skip
    return questions


def parse_yes_no(text: str) -> str:
    """"no" if the first sentence has the word No, no or not, else "yes", even if it is empty."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score_list(answers, truths) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of "yes", of answers to one of POPE's lists.

    truths: "yes" or "no" for each answer, in the same order; "yes" is the positive class.
    """
    pairs = Counter(zip(map(parse_yes_no, answers), truths, strict=True))
    hits, misses = pairs["yes", "yes"], pairs["no", "yes"]
    false, right_no = pairs["yes", "no"], pairs["no", "no"]
    precision, recall = hits / (hits + false + EPSILON), hits / (hits + misses + EPSILON)
    return {
        "accuracy": (hits + right_no) / pairs.total(),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + EPSILON),
        "yes_ratio": (hits + false) / pairs.total(),
    }


def score(questions, answers) -> dict[str, float]:
    """All of each list, and the means of accuracy and F1. Published tables most likely hold F1,
    though TinyLLaVA's paper calls it accuracy."""
    groups = defaultdict(lambda: ([], []))
    for question, text in zip(questions, answers, strict=True):
        groups[question.group][0].append(text)
        groups[question.group][1].append(question.answer)
    lists = {name: score_list(*both) for name, both in groups.items()}
    means = {
        key: sum(one[key] for one in lists.values()) / len(lists) for key in ("accuracy", "f1")
    }
    return means | {f"{key}/{name}": value for name, one in lists.items()
                    for key, value in one.items()}  # fmt: skip
