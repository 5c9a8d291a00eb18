"""LLaVA-Bench (in the wild): open answers, scored by a judge beside a reference's.

Reads questions.jsonl (question_id, image, text, category) and images/. The judge (GPT-4) gives
reference and model 1 to 10 each: LLaVA's eval_gpt_review_bench.py reads answers.jsonl, and writes
its reviews as rows {"category", "tuple": [reference, model]} of a .jsonl file.
"""

from collections import defaultdict
from pathlib import Path

from tlv.benchmarks.question import BenchmarkError, Question, read_rows

MAX_NEW_TOKENS = 1024
KEYS = ("question_id", "image", "text", "category")


def read(folder: Path, num_frames=None) -> list[Question]:
    return [
        Question(str(row["question_id"]), row["text"], f"images/{row['image']}", None, (),
                 row["category"].removeprefix("llava_bench_"))
        for row in read_rows(folder / "questions.jsonl", KEYS)
    ]  # fmt: skip


def score_judged(questions, path: Path) -> dict[str, float]:
    """100 times the sum of the model's scores over the sum of the reference's: all, by category."""
    reviews, sums = read_rows(path, ("tuple", "category")), defaultdict(lambda: [0.0, 0.0])
    if len(reviews) != len(questions):
        raise BenchmarkError(f"{path}: {len(reviews)} reviews of {len(questions)} questions; each "
                             "needs one")
    for number, review in enumerate(reviews):
        pair = review["tuple"]
        if not _is_pair(pair):
            raise BenchmarkError(f"{path}: review {number}: tuple = {pair!r}; two scores from 1 to "
                                 "10, the reference's and the model's, are wanted")
        for name in ("overall", str(review["category"]).removeprefix("llava_bench_")):
            sums[name] = [a + b for a, b in zip(sums[name], pair, strict=True)]
    return {name: 100 * model / reference for name, (reference, model) in sums.items()}


def _is_pair(scores) -> bool:
    """Two numbers above 0? The judge's script writes -1 where it found none."""
    return (isinstance(scores, list) and len(scores) == 2
            and all(isinstance(score, int | float) and score > 0 for score in scores))
