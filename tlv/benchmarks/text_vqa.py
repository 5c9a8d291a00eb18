"""TextVQA (validation 0.5.1), with the words that an OCR reader found in the question.

Reads llava_textvqa_val_v051_ocr.jsonl (question_id, image, text), TextVQA_0.5.1_val.json and
train_images/. A row's `question_id` is its picture's; with the question itself it names the truth.
"""

import re
from pathlib import Path

from tlv.benchmarks.question import BenchmarkError, Question, read_rows, read_table
from tlv.benchmarks.vqa import score_vqa

MAX_NEW_TOKENS = 128
OCR_FIRST, OCR = "OCR tokens: ", "Reference OCR token: "


def read(folder: Path, num_frames=None) -> list[Question]:
    path = folder / "TextVQA_0.5.1_val.json"
    truths = {(row["image_id"], row["question"].lower()): row["answers"]
              for row in read_table(path)["data"]}  # fmt: skip
    questions, asked = [], folder / "llava_textvqa_val_v051_ocr.jsonl"
    for row in read_rows(asked, ("question_id", "image", "text")):
        key = row["question_id"], find_question(row["text"])
        if key not in truths:
            raise BenchmarkError(f"{path}: no answers to {key[1]!r} about picture {key[0]!r}; both "
                                 "files must be of version 0.5.1")
        media = f"train_images/{row['image']}"
        questions.append(Question(f"{key[0]}/{len(questions)}", row["text"], media, truths[key]))
    return questions


def find_question(prompt: str) -> str:
    """The question in a prompt of one of the four published shapes, in lower case."""
    lines = prompt.split("\n")
    if prompt.startswith(OCR_FIRST):
        if found := re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL):
            return found[1].lower()
    elif OCR in prompt and len(lines) == 3:
        return lines[prompt.startswith(OCR)].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise BenchmarkError(f"the prompt {prompt!r} has none of TextVQA's four shapes; the question, "
                         f"perhaps '{OCR}...', and what form the answer has, in lines of their own")


def score(questions, answers) -> dict[str, float]:
    hits = [score_vqa(text, q.answer) for q, text in zip(questions, answers, strict=True)]
    return {"accuracy": sum(hits) / len(hits)}
