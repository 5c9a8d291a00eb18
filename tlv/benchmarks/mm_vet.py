"""MM-Vet: open answers, scored by a judge from 0 to 1.

Reads llava-mm-vet.jsonl (question_id, image, text), mm-vet.json ({"v1_0": {"capability": [...]}})
and images/. The judge is GPT-4 behind the benchmark's own mm-vet_evaluator, which takes the file to
upload; its ...-grade-1runs.json comes back, {"v1_0": {"score": [one of each run]}}, or that of a
judge of your own, {"v1_0": score or text}. Judges change: name yours beside the score.
"""

import re
from collections import defaultdict
from pathlib import Path

from tlv.benchmarks.question import BenchmarkError, Question, read_rows, read_table

MAX_NEW_TOKENS = 1024
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def read(folder: Path, num_frames=None) -> list[Question]:
    needs, questions = read_table(folder / "mm-vet.json"), []
    for row in read_rows(folder / "llava-mm-vet.jsonl", ("question_id", "image", "text")):
        key = f"v1_{str(row['question_id']).removeprefix('v1_')}"
        if key not in needs:
            raise BenchmarkError(f"{folder / 'mm-vet.json'}: no question {key!r}; both files must "
                                 "be of one version")
        group = ",".join(c for c in CAPABILITIES if c in needs[key]["capability"])
        media = f"images/{row['image']}"
        questions.append(Question(key, row["text"], media, needs[key].get("answer"), (), group))
    return questions


def upload(folder: Path, questions, answers) -> dict[str, str]:
    """What the judge's notebook takes."""
    return {q.id: text for q, text in zip(questions, answers, strict=True)}


SCORE = re.compile(  # no part of 1.05, 1,5, 1-2, 1e-3, 1%, 1/10 or 1 (out of 10)
    r"\s*([01](?:\.\d+)?)(?![.,\-]?\d|e|\s*%|\s*\(?\s*(?:/|of\b|out of\b))", re.IGNORECASE
)


def parse_score(said) -> float | None:
    """The judge's score: a number from 0 to 1, alone or first in a text; None for anything else."""
    if isinstance(said, int | float):
        return float(said) if 0 <= said <= 1 else None
    found = SCORE.match(str(said))
    return float(found[1]) if found and float(found[1]) <= 1 else None


def _score_of(said) -> float | None:
    """The mean over the runs of a judge, or the score of one."""
    runs = said.get("score") if isinstance(said, dict) else [said]
    scores = [parse_score(one) for one in runs] if isinstance(runs, list) else []
    return None if None in scores or not scores else sum(scores) / len(scores)


def score_judged(questions, path: Path) -> dict[str, float]:
    """Means times 100: `total`, each capability, and each combination of them as it occurs."""
    judged, groups = read_table(path), defaultdict(list)
    for question in questions:
        said = judged.get(question.id)
        value = _score_of(said)
        if value is None:
            raise BenchmarkError(f"{path}: the judge's word on {question.id} is {said!r}; a score "
                                 "from 0.0 to 1.0 is wanted")
        names = question.group.split(",")
        for name in ("total", *names, f"only/{question.group}"):
            groups[name].append(value)
    return {name: 100 * sum(values) / len(values) for name, values in groups.items()}
