"""GQA (test-dev, balanced): exact match of short answers.

Reads llava_gqa_testdev_balanced.jsonl (question_id, image, text), testdev_balanced_questions.json
and images/.
"""

from pathlib import Path

from tlv.benchmarks.question import BenchmarkError, Question, read_rows, read_table

MAX_NEW_TOKENS = 128


def read(folder: Path, num_frames=None) -> list[Question]:
    path, questions = folder / "testdev_balanced_questions.json", []
    truths = read_table(path)
    asked = folder / "llava_gqa_testdev_balanced.jsonl"
    for row in read_rows(asked, ("question_id", "image", "text")):
        key = str(row["question_id"])
        if key not in truths:
            raise BenchmarkError(f"{path}: no question {key!r}; both files must be of one version")
        answer = truths[key]["answer"]
        questions.append(Question(key, row["text"], f"images/{row['image']}", answer))
    return questions


def score(questions, answers) -> dict[str, float]:
    pairs = zip(questions, answers, strict=True)
    hits = [text.rstrip(".").lower() == question.answer for question, text in pairs]
    return {"accuracy": sum(hits) / len(hits)}
