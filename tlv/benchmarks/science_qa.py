"""ScienceQA (test): letters, over all questions and over those with a picture (IMG).

Reads llava_test_CQM-A.json (id, conversations, perhaps image), problems.json and
images/test/.
"""

import re
from pathlib import Path

from tlv.benchmarks.letters import LETTERS
from tlv.benchmarks.question import LETTER, BenchmarkError, Question, read_rows, read_table

MAX_NEW_TOKENS = 1024


def read(folder: Path, num_frames=None) -> list[Question]:
    path, questions = folder / "problems.json", []
    problems = read_table(path)
    for row in read_rows(folder / "llava_test_CQM-A.json", ("id", "conversations")):
        if str(row["id"]) not in problems:
            raise BenchmarkError(f"{path}: no problem {row['id']!r}; both files must be of one "
                                 "version")
        problem = problems[str(row["id"])]
        asked = row["conversations"][0]["value"].replace("<image>", "").strip()
        media = f"images/test/{row['image']}" if "image" in row else None
        questions.append(Question(
            str(row["id"]), f"{asked}\n{LETTER}", media, LETTERS[problem["answer"]],
            tuple(problem["choices"]), "img" if media else "text",
        ))  # fmt: skip
    return questions


def parse_science(text: str) -> str | None:
    """"B", "B. an answer" or one "The answer is B."; None for anything else, which is wrong.

    After "The answer is B" published code takes any character, not a full stop alone.
    """
    if text in LETTERS[:5] and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def score(questions, answers) -> dict[str, float]:
    read = [parse_science(text) for text in answers]
    hits = [letter == q.answer for q, letter in zip(questions, read, strict=True)]
    pictures = [hit for q, hit in zip(questions, hits, strict=True) if q.group == "img"]
    return {
        "accuracy": sum(hits) / len(hits),
        "accuracy/img": sum(pictures) / max(1, len(pictures)),
        "unparsed_rate": read.count(None) / len(read),
    }
