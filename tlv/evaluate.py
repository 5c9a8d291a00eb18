"""What a model's answers (`tlv.answering`) are worth.

For multiple choice the right answer is a letter. Nothing is ever guessed for the model: an answer
without a readable letter is wrong and counted as unparsed. Each result is one record (one line of
answers.jsonl, with the names of lmms-eval's sample log), and every number is computed from the
records alone. Taught in notebook 05.
"""

import re
import string
from collections import Counter, defaultdict
from functools import cache

import numpy as np

from tlv.answering import Answer
from tlv.intervals import clustered_interval

CONDITIONS = ("video", "blind", "other clip", "majority")  # the model, then the three baselines
FORMS = ("free", "choice")
LETTERS = string.ascii_uppercase


# ---- right or wrong -------------------------------------------------------------------------

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, small numbers as words, single spaces.

    As SQuAD's scorer (arXiv 1606.05250) does it, and numbers besides.
    """
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    words = [NUMBERS[int(w)] if w.isdecimal() and int(w) <= 10 else w for w in words]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def exact_match(prediction: str, answer: str) -> bool:
    return normalise(prediction) == normalise(answer)


def extract_choice(text: str, options: list[str]) -> str:
    """The letter that an answer names, "" where it names none or several.

    In this order, the first that applies decides: the letter alone ("b", "(C)", "**B**"); "the
    answer is C"; letters with a mark ("A. red", "(C)"); the words of one option; a lone capital.
    A capital A before a word is an article. Nothing is guessed.
    """
    letters = LETTERS[: len(options)]
    text = re.sub(r"[*_`#\"]", "", text).strip()
    one = f"[{letters}{letters.lower()}]"
    if alone := re.fullmatch(rf"[\(\[]?({one})[\)\]]?[.,:;!]?", text):
        return alone[1].upper()
    # What comes after a letter that is no article: the end, a mark, or one of these words.
    end = r"(?=\s*$|[^\w\s']|\s*\n|\s+(?:or|and|is|because)\b)"
    capital = f"[{letters.replace('A', '')}]" if len(letters) > 1 else one
    named = r"\b(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*"
    said = rf"{named}(?:[\(\[]({one})[\)\]]|({one}){end}|({capital})\b)"
    marked = rf"(?:^|\s)(?:[\(\[]({one})[\)\]]|({one})[.):](?=\s|$))"
    for pattern in (said, marked):
        if hits := {next(filter(None, hit)).upper() for hit in re.findall(pattern, text)}:
            return hits.pop() if len(hits) == 1 else ""
    if hits := [k for k, option in enumerate(options) if exact_match(text, option)]:
        return LETTERS[hits[0]] if len(hits) == 1 else ""
    lone = rf"\b(?:({capital})\b(?!')|(A){end})"
    hits = {next(filter(None, hit)) for hit in re.findall(lone, text)}
    return hits.pop() if len(hits) == 1 else ""


def in_words(question: str, answer: str) -> str:
    """An answer without its letter: the option that it names, where the question lists some."""
    options = re.findall(r"^[A-Z][.)] *(.+)$", question, flags=re.M)
    letter = extract_choice(answer, options) if options else ""
    return options[LETTERS.index(letter)] if letter else answer


def make_records(questions: list[dict], answers: list[Answer], condition: str) -> list[dict]:
    """One record per question: what was asked, what came back, how it was read, whether right.

    `questions` are the original ones (with their own clips), whatever `answers` were given to see.
    """
    records = []
    for question, answer in zip(questions, answers, strict=True):
        if question["form"] == "choice":
            parsed, target = extract_choice(answer.text, question["options"]), question["answer"]
        else:
            parsed, target = normalise(answer.text), normalise(question["answer"])
        records.append({
            "doc_id": question["id"], "condition": condition,
            **{k: question[k] for k in ("video", "type", "form", "unseen_pair", "question")},
            "options": question["options"], "target": question["answer"],
            "resps": [answer.text], "filtered_resps": [parsed], "correct": parsed == target,
            "confidence": round(answer.confidence, 6), "error": answer.error,
        })  # fmt: skip
    return records


# ---- the training majority ------------------------------------------------------------------


def opening(question: str) -> str:
    """The first two words of a question: what it asks for, in any data set."""
    return " ".join(re.findall(r"\w+", question.lower().replace("<video>", ""))[:2])


def majority_answers(turns: list[tuple[str, str]], questions: list[dict]) -> list[Answer]:
    """The training answer given most often to questions that open alike; no model is asked.

    turns: (question, answer) of the training data; an answer with a letter counts as its option.
    For multiple choice, the option that was the training answer most often. Ties: the first in
    alphabetical order, or the first option. An opening never trained on: the majority of all.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for question, answer in turns:
        counts[opening(question)][normalise(in_words(question, answer))] += 1
    every = Counter()
    for seen in counts.values():
        every.update(seen)

    @cache
    def first(words: str) -> str:
        seen = counts.get(words, every)
        return min(seen, key=lambda answer: (-seen[answer], answer), default="")

    answers = []
    for question in questions:
        words = opening(question["question"])
        if question["form"] == "choice":
            seen = counts.get(words, every)
            votes = [seen[normalise(option)] for option in question["options"]]
            answers.append(Answer(LETTERS[int(np.argmax(votes))]))
        else:
            answers.append(Answer(first(words)))
    return answers


# ---- numbers --------------------------------------------------------------------------------


def accuracy(records: list[dict]) -> dict[str, float]:
    """{"": share right, "/low", "/high": its 95% interval clustered by clip}."""
    correct = [record["correct"] for record in records]
    low, high = clustered_interval(correct, [record["video"] for record in records])
    return {"": sum(correct) / len(correct), "/low": low, "/high": high}


def calibration_error(records: list[dict], num_bins: int = 10) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over equal bins,
    weighted by the answers in each (arXiv 1706.04599)."""
    confidence = np.array([r["confidence"] for r in records])
    correct = np.array([r["correct"] for r in records], dtype=float)
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(records))


def confusion(records: list[dict], question_type: str) -> tuple[list[str], np.ndarray]:
    """Labels and counts[truth, answer] of the free-form answers of a type.

    What is no truth of any question is counted in the last column, "other"; its row is empty.
    """
    rows = [r for r in records if r["type"] == question_type and r["form"] == "free"]
    labels = sorted({normalise(r["target"]) for r in rows}) + ["other"]
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    for row in rows:
        said = row["filtered_resps"][0]
        column = labels.index(said) if said in labels else len(labels) - 1
        counts[labels.index(normalise(row["target"])), column] += 1
    return labels, counts


def _of_kind(kind: str, form: str | None = None):
    """Is a record of this type, and of this form?"""
    return lambda record: record["type"] == kind and form in (None, record["form"])


def summarise(records: list[dict], seed: int) -> dict[str, float | int]:
    """The flat metrics of an evaluation from the records of all CONDITIONS.

    accuracy/<part> with /low and /high for free, choice, unseen_pairs, type/<type> (both forms
    together) and type/<type>/<form>; baseline/type/... is the best of the three baselines, with
    each beside it. Clips with a shape-colour pair that no training clip shows are scored apart:
    they are in unseen_pairs alone.
    """
    by = defaultdict(list)
    for record in records:
        by[record["condition"]].append(record)
    if missing := [name for name in CONDITIONS if not by[name]]:
        raise ValueError(f"no records of {', '.join(missing)}; all of {CONDITIONS} are needed")
    seen = {name: [r for r in rows if not r["unseen_pair"]] for name, rows in by.items()}
    own = seen["video"]
    parts = {
        "free": [r for r in own if r["form"] == "free"],
        "choice": [r for r in own if r["form"] == "choice"],
        "unseen_pairs": [r for r in by["video"] if r["unseen_pair"]],
    }
    types = sorted({r["type"] for r in own})
    kinds = {f"type/{kind}": _of_kind(kind) for kind in types}
    kinds |= {f"type/{kind}/{form}": _of_kind(kind, form) for kind in types for form in FORMS}
    parts |= {name: list(filter(is_kind, own)) for name, is_kind in kinds.items()}
    metrics = {}
    for name, rows in parts.items():
        if rows:
            metrics |= {f"accuracy/{name}{end}": round(v, 6) for end, v in accuracy(rows).items()}
    for name, is_kind in kinds.items():
        if not parts[name]:
            continue
        for condition in CONDITIONS[1:]:
            rows = list(filter(is_kind, seen[condition]))
            key = f"baseline/{condition.replace(' ', '_')}/{name.removeprefix('type/')}"
            metrics[key] = round(sum(r["correct"] for r in rows) / len(rows), 6)
            metrics[f"baseline/{name}"] = max(metrics.get(f"baseline/{name}", 0.0), metrics[key])
    choice = [r for r in by["video"] if r["form"] == "choice"]
    unparsed = sum(not r["filtered_resps"][0] for r in choice) / max(1, len(choice))
    metrics |= {"unparsed_rate": round(unparsed, 6), "num_questions": len(by["video"])}
    metrics["seed"] = seed
    return metrics
