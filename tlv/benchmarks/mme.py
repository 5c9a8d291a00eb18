"""MME: two yes-no questions about each picture, in fourteen subtasks.

Reads llava_mme.jsonl (question_id "subtask/0001.png", image, text) and
MME_Benchmark_release_version/{subtask}/: pictures and, beside them or in images/ and
questions_answers_YN/, a text file for each with lines "question<tab>Yes".
"""

from collections import defaultdict
from pathlib import Path

from tlv.benchmarks.question import SHORT, BenchmarkError, Question, read_rows

MAX_NEW_TOKENS = 128
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")  # fmt: skip
RELEASE, REQUEST = "MME_Benchmark_release_version", "Please answer yes or no."


def read(folder: Path, num_frames=None) -> list[Question]:
    questions = []
    for row in read_rows(folder / "llava_mme.jsonl", ("question_id", "image", "text")):
        subtask, name = row["question_id"].split("/")[0], Path(row["question_id"]).name
        place = folder / RELEASE / subtask
        is_split = (place / "questions_answers_YN").is_dir()
        truths = _truths(place / ("questions_answers_YN" if is_split else "") / name)
        asked = _plain(row["text"])
        if asked not in truths:
            raise BenchmarkError(f"{place}: no answer to {asked!r} about {name}; llava_mme.jsonl "
                                 f"and {RELEASE} must be of one version")
        media = f"{RELEASE}/{subtask}/{'images/' if is_split else ''}{name}"
        questions.append(
            Question(row["question_id"], row["text"], media, truths[asked], (), subtask)
        )
    return questions


def _truths(picture: Path) -> dict[str, str]:
    path = picture.with_suffix(".txt")
    if not path.is_file():
        raise BenchmarkError(f"{path}: no such file; the folder tree stands in data/README.md")
    pairs = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    if odd := [pair for pair in pairs if len(pair) != 2]:
        raise BenchmarkError(f"{path}: the line {odd[0]} must be a question and its answer with a "
                             "tab between them")
    return {_plain(question): truth.strip() for question, truth in pairs}


def _plain(text: str) -> str:
    """A question without what either file asks besides."""
    return " ".join(text.replace(SHORT, "").replace(REQUEST, "").split())


def parse_mme(text: str) -> str:
    """"yes", "no", or "other", which is wrong."""
    text = text.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def score(questions, answers) -> dict[str, float]:
    """Scores per subtask (at most 200) and the sums `perception` (2000) and `cognition` (800).

    Each picture has two questions; 100 for their accuracy, and 100 more for the share of pictures
    with both right.
    """
    pictures = defaultdict(lambda: defaultdict(list))
    for question, text in zip(questions, answers, strict=True):
        hit = parse_mme(text) == question.answer.lower()
        pictures[question.group][question.media].append(hit)
    scores = {}
    for subtask, pairs in pictures.items():
        if wrong := [name for name, hits in pairs.items() if len(hits) != 2]:
            raise BenchmarkError(f"MME {subtask}: picture {wrong[0]!r} has {len(pairs[wrong[0]])} "
                                 "questions; each has two, and a --limit must be even")
        accuracy = sum(map(sum, pairs.values())) / (2 * len(pairs))
        scores[subtask] = 100 * (accuracy + sum(map(all, pairs.values())) / len(pairs))
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        scores[name] = sum(scores.get(subtask, 0.0) for subtask in subtasks)
    return scores
