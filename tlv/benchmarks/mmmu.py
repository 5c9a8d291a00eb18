"""MMMU (validation): letters by its own rule, and open answers; one mean over both.

Reads anns_for_eval.json (id, prompt, question_type, all_choices, index2ans, perhaps image),
all_images/ and MMMU's own eval/answer_dict_val.json ({id: {"question_type", "ground_truth"}}).
Questions about several pictures have no `image`: published code gives them a random letter, here
they are asked as text.
"""

import re
from pathlib import Path

from tlv.benchmarks.letters import parse_letter
from tlv.benchmarks.question import BenchmarkError, Question, read_rows, read_table

MAX_NEW_TOKENS = 1024
OPEN = "open"
# Where an answer to an open question may begin, in a text that reasons first.
CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
COMMAS, POWERS = r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+"
PLAIN = r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"


def read(folder: Path, num_frames=None) -> list[Question]:
    path, questions = folder / "eval/answer_dict_val.json", []
    truths = read_table(path)
    for row in read_rows(folder / "anns_for_eval.json", ("id", "prompt", "question_type")):
        if row["id"] not in truths:
            raise BenchmarkError(f"{path}: no answer to {row['id']!r}; both files must be of one "
                                 "split")
        is_open = row["question_type"] != "multiple-choice"
        options = () if is_open else tuple(row["index2ans"][k] for k in row["all_choices"])
        media = f"all_images/{row['image']}" if "image" in row else None
        questions.append(Question(
            row["id"], row["prompt"].replace("<image>", "").strip(), media,
            truths[row["id"]]["ground_truth"], options, OPEN if is_open else "choice",
        ))  # fmt: skip
    return questions


def parse_open(text: str) -> list:
    """What an open answer may mean, normalised: words, and numbers rounded to two places.

    From the parts of the text that come after a word such as "is" or "=" the shortest is taken, and
    the numbers in it too.
    """
    text = text.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", text)
    keys = []
    for number, part in enumerate(parts):
        cues = (*CUES, "=") if number == len(parts) - 1 else CUES
        found = [part.rpartition(cue)[2].strip() for cue in cues if cue in part]
        shortest = ""  # published code lets a later part fill an empty one
        for one in found:
            shortest = one if not shortest or len(one) < len(shortest) else shortest
        if shortest.strip() not in (":", ",", ".", "!", "?", ";", "'", ""):
            keys.append(shortest)
    keys = keys or [text]
    forms = (COMMAS, POWERS, PLAIN)
    numbers = [number for key in keys for form in forms for number in re.findall(form, key)]
    return list(dict.fromkeys(n for key in keys + numbers for n in normalise(key)))


def normalise(text) -> list:
    """A number as a float with two places, words in lower case; of one letter, spaces around it."""
    text = str(text).strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_right(meant: list, truth) -> bool:
    """Does one of what was meant hold the truth (words), or equal it (numbers)?"""
    truths = [n for one in (truth if isinstance(truth, list) else [truth]) for n in normalise(one)]
    for one in meant:
        if isinstance(one, str):
            if any(isinstance(t, str) and t in one for t in truths):
                return True
        elif one in truths:
            return True
    return False


def score(questions, answers) -> dict[str, float]:
    """Accuracy over both kinds and of each; `accuracy/strict` reads "B." as well as " B "."""
    hits, num_unparsed = {"accuracy": [], "accuracy/strict": []}, 0
    for question, text in zip(questions, answers, strict=True):
        if question.group == OPEN:
            hit = strict = is_right(parse_open(text), question.answer)
        else:
            letter = parse_letter(text, question.options, first_letter=False)
            num_unparsed, hit = num_unparsed + (letter is None), letter == question.answer
            strict = parse_letter(text, question.options, False, strict=True) == question.answer
        hits["accuracy"].append(hit)
        hits["accuracy/strict"].append(strict)
        hits.setdefault(f"accuracy/{question.group}", []).append(hit)
    return {
        **{name: sum(some) / len(some) for name, some in hits.items()},
        "unparsed_rate": num_unparsed / max(1, len(hits.get("accuracy/choice", []))),
    }


def upload(folder: Path, questions, answers) -> dict[str, str]:
    """What MMMU's own main_eval_only.py reads: bare letters, "" for none, and open answers."""
    return {
        q.id: text if q.group == OPEN else parse_letter(text, q.options, first_letter=False) or ""
        for q, text in zip(questions, answers, strict=True)
    }
