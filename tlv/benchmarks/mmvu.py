"""MMVU (validation): letters, and open answers by substring, one mean over both.

Reads validation.json and the clips that its `video` addresses name, below videos/, as
yale-nlp/MMVU has them. An open answer is right if it and the truth hold one another, whatever the
case: published code asks no judge. An empty one is wrong (to published code, every truth holds it).
"""

from pathlib import Path

from tlv.benchmarks.letters import ask_letter, parse_letter
from tlv.benchmarks.question import Question, read_rows

MAX_NEW_TOKENS = 1024
OPEN = "Answer the question directly without explanation."


def read(folder: Path, num_frames=None) -> list[Question]:
    keys = ("question_type", "question", "choices", "answer", "video")
    return [_question(number, row) for number, row in
            enumerate(read_rows(folder / "validation.json", keys))]  # fmt: skip


def _question(number, row) -> Question:
    is_choice = row["question_type"] == "multiple-choice"
    options = tuple(map(str, row["choices"].values())) if is_choice else ()
    prompt = ask_letter(row["question"], options, "{}. {}") if is_choice else (
        f"{row['question']}\n{OPEN}")  # fmt: skip
    return Question(str(row.get("id", number)), prompt, f"videos/{_local(row['video'])}",
                    str(row["answer"]), options, row["question_type"])  # fmt: skip


def _local(address: str) -> str:
    """What comes after the folder videos/ in an address on the Hub."""
    return address.partition("/videos/")[2] or address


def score(questions, answers) -> dict[str, float]:
    right, num_unparsed = {}, 0
    for question, text in zip(questions, answers, strict=True):
        if question.options:
            letter = parse_letter(text, question.options)
            num_unparsed, hit = num_unparsed + (letter is None), letter == question.answer
        else:
            short, long = sorted((text.lower(), question.answer.lower()), key=len)
            hit = bool(short) and short in long
        right.setdefault(question.group, []).append(hit)
    scores = {f"accuracy/{group}": sum(hits) / len(hits) for group, hits in right.items()}
    num_choices = sum(bool(question.options) for question in questions)
    return {"accuracy": sum(map(sum, right.values())) / len(answers), **scores,
            "unparsed_rate": num_unparsed / max(1, num_choices)}  # fmt: skip
