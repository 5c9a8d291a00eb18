"""MMBench (dev): letters, each question once for every rotation of its options (CircularEval).

Reads mmbench_dev_20230712.tsv (index, question, hint, A, B, C, D, answer, category, image in
base64; a rotation's index is its question's plus a multiple of 1,000,000). Its pictures are written
to mmbench_images/ beside it. Published scores come from a server, which takes the table with a
column `prediction` and asks GPT which option an answer without a letter means; the answers of dev
are in the table, and such an answer is wrong here.
"""

import base64
from collections import defaultdict
from itertools import takewhile
from pathlib import Path

from tlv.benchmarks.letters import LETTERS, ask_letter
from tlv.benchmarks.question import BenchmarkError, Question, read_rows
from tlv.files import write_bytes

MAX_NEW_TOKENS = 1024
TABLE, PICTURES, ROTATION = "mmbench_dev_20230712.tsv", "mmbench_images", 1_000_000
# What may stand before and after a letter, in the order in which it is looked for.
MARKS = (("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
         (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."))  # fmt: skip


def read(folder: Path, num_frames=None) -> list[Question]:
    path = folder / TABLE
    rows = read_rows(path, ("index", "question", "hint", "A", "B", "image", "answer", "category"))
    pictures = {row["index"]: row["image"] for row in rows}
    return [_question(folder, path, row, pictures) for row in rows]


def _question(folder, path, row, pictures) -> Question:
    options = tuple(takewhile(_is_told, (row.get(letter, "") for letter in "ABCD")))
    hint = f"{row['hint']}\n" if _is_told(row["hint"]) else ""
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


def _is_told(cell: str) -> bool:
    return cell.lower() not in ("", "nan", "none")


def parse_choice(text: str, options) -> str | None:
    """The letter that an answer names, by MMBench's rule; None where it names none or several.

    The one letter that stands as a word, bare or with a mark; a bare A among more than three words
    is an article. Else the one option whose words the answer holds.
    """
    words = text.split()
    for before, after in MARKS:
        found = [letter for letter in LETTERS[:5] if f"{before}{letter}{after}" in words]
        is_article = found == ["A"] and not before + after and len(words) > 3
        if len(found) == 1 and not is_article:
            return found[0]
    pairs = zip(LETTERS, options, strict=False)
    found = [letter for letter, option in pairs if option.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def score(questions, answers) -> dict[str, float]:
    """A question is right if every rotation of it is."""
    rotations, groups, read = defaultdict(list), {}, []
    for question, text in zip(questions, answers, strict=True):
        letter, number = parse_choice(text, question.options), int(question.id) % ROTATION
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
