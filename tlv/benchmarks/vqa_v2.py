"""VQAv2 (test-dev): the EvalAI server alone knows the answers.

Reads llava_vqav2_mscoco_test-dev2015.jsonl (question_id, image, text), the list of all questions
llava_vqav2_mscoco_test2015.jsonl, and test2015/. The file to upload has an answer to each question
of the second list, "" to those that were not asked.
"""

from pathlib import Path

from tlv.benchmarks.question import Question, read_rows
from tlv.benchmarks.vqa import normalise_vqa

MAX_NEW_TOKENS = 128
KEYS = ("question_id", "image", "text")


def read(folder: Path, num_frames=None) -> list[Question]:
    return [Question(str(row["question_id"]), row["text"], f"test2015/{row['image']}") for row in
            read_rows(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", KEYS)]  # fmt: skip


def upload(folder: Path, questions, answers) -> list[dict]:
    """What the server takes."""
    said = {q.id: normalise_vqa(text) for q, text in zip(questions, answers, strict=True)}
    rows = read_rows(folder / "llava_vqav2_mscoco_test2015.jsonl", ("question_id",))
    return [{"question_id": row["question_id"], "answer": said.get(str(row["question_id"]), "")}
            for row in rows]  # fmt: skip
