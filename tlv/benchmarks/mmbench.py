"""MMBench (dev): letters, each question once for every rotation of its options (CircularEval).

Reads mmbench_dev.tsv (index, question, hint, A, B, C, D, answer, category, image in base64; a
rotation's index is its question's plus a multiple of 1,000,000). Its pictures are written to
mmbench_images/ beside it. Published scores come from a server, which takes the table with a column
`prediction`; dev has its answers in it.
"""

import base64
from collections import defaultdict
from pathlib import Path

from tlv.benchmarks.letters import ask_letter, parse_letter
from tlv.benchmarks.question import BenchmarkError, Question, read_rows
from tlv.files import write_bytes

MAX_NEW_TOKENS = 1024
TABLE, PICTURES, ROTATION = "mmbench_dev.tsv", "mmbench_images", 1_000_000


def read(folder: Path, num_frames: int = 16) -> list[Question]:
    path = folder / TABLE
    rows = read_rows(path, ("index", "question", "hint", "A", "B", "image", "answer", "category"))
    pictures = {row["index"]: row["image"] for row in rows}
    return [_question(folder, path, row, pictures) for row in rows]


def _question(folder, path, row, pictures) -> Question:
    options = tuple(row[letter] for letter in "ABCD" if row.get(letter) not in (None, "", "nan"))
    hint = f"{row['hint']}\n" if row["hint"] not in ("", "nan") else ""
    data = row["image"]
    data = pictures.get(data, data)  # a rotation may name the row that holds its picture
    place = f"{PICTURES}/{int(row['index']) % ROTATION}.jpg"
    if not (folder / place).is_file():
        try:
            write_bytes(folder / place, base64.b64decode(data, validate=True))
        except ValueError as error:
            why = f"{path}: row {row['index']}: its image is no base64: {error}"
            raise BenchmarkError(why) from error
    prompt = hint + ask_letter(row["question"], options, "{}. {}")
    return Question(row["index"], prompt, place, row["answer"], options, row["category"])


def score(questions, answers) -> dict[str, float]:
    """A question is right if every rotation of it is."""
    rotations, groups, read = defaultdict(list), {}, []
    for question, text in zip(questions, answers, strict=True):
        letter, number = parse_letter(text, question.options), int(question.id) % ROTATION
        rotations[number].append(letter == question.answer)
        groups[number] = question.group
        read.append(letter)
    by_group = defaultdict(list)
    for number, hits in rotations.items():
        by_group[groups[number]].append(all(hits))
    return {
        "accuracy": sum(map(sum, by_group.values())) / len(rotations),
        **{f"accuracy/{name}": sum(hits) / len(hits) for name, hits in by_group.items()},
        "accuracy/one_rotation": sum(map(sum, rotations.values())) / len(read),
        "unparsed_rate": read.count(None) / len(read),
    }
