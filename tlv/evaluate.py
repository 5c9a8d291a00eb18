"""Answers of a model to a list of questions, and what they are worth.

A question is a dict {"id", "video", "type", "form": "free" | "choice", "question", "answer",
"options", "unseen_pair"}; for "choice" the answer is a letter. Every question is asked alone,
greedily; nothing is ever guessed for the model: an answer without a readable letter is wrong and
counted as unparsed. Each result is one record (one line of answers.jsonl, with the names of
lmms-eval's sample log), and every number is computed from the records alone. Taught in notebook 05.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from tlv import long_video
from tlv.chat import encode, stop_token_ids, with_video
from tlv.video import VideoError

CONDITIONS = ("video", "blind", "other clip", "majority")  # the model, then the three baselines
LETTERS = string.ascii_uppercase


# ---- answers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the model says; `confidence` is the probability that it gives this very answer.

    `error` says why there is none (a clip that cannot be decoded); then the text is empty.
    """

    text: str
    confidence: float = 0.0
    error: str = ""


def blind(questions: list[dict]) -> list[dict]:
    """The same questions without their clips: what language alone gives away."""
    return [{**question, "video": None} for question in questions]


def with_other_clip(questions: list[dict], seed: int) -> list[dict]:
    """The same questions on another clip of the same set, one and the same for all of a clip's.

    The clips are put into a random ring and each takes the next one's place, so that none keeps
    its own. ValueError if there is only one clip.
    """
    names = sorted({question["video"] for question in questions})
    if len(names) < 2:
        raise ValueError(f"{len(names)} clip: another clip's video needs at least 2")
    ring = np.random.default_rng(seed).permutation(names)
    other = dict(zip(ring.tolist(), np.roll(ring, 1).tolist(), strict=True))
    return [{**question, "video": other[question["video"]]} for question in questions]


@torch.inference_mode()
def generate_answers(model, processor, questions: list[dict], videos_dir, *, batch_size: int = 32,
                     max_new_tokens: int = 32, timeout_s=None,
                     progress: Callable = iter) -> list[Answer]:  # fmt: skip
    """Greedy answers, in the order of `questions`; a question whose "video" is None is asked blind.

    Questions of one clip follow each other, so that each clip is decoded and encoded once. Rows are
    padded on the left and clips go in as features (T, N, D_v). A clip that cannot be decoded gives
    an Answer with its error. `progress` wraps the batches (tqdm). A model that chooses frames by
    the question takes a question's `query`, or else its first line, and one clip at a time.
    """
    is_training = model.training
    model.eval()
    if processor.selector is not None:
        answers = _answer_long(model, processor, questions, videos_dir, max_new_tokens, progress)
        model.train(is_training)
        return answers

    def place(i):
        return questions[i]["video"] or "", len(questions[i]["question"]), i

    order = sorted(range(len(questions)), key=place)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found: dict[int, Answer] = {}
    clips: dict = {}
    for batch in progress(batches):
        names = {questions[i]["video"] for i in batch} - {None}
        clips = {n: clips.get(n) for n in names}  # what the last batch saw and this one needs
        for name in sorted(n for n in names if clips[n] is None):
            clips[name] = _encode_clip(model, processor, Path(videos_dir) / name, timeout_s)
        for i in batch:
            if isinstance(clips.get(questions[i]["video"]), VideoError):
                found[i] = Answer("", error=str(clips[questions[i]["video"]].reason))
        good = [i for i in batch if i not in found]
        if good:
            rows = [(questions[i]["question"], clips.get(questions[i]["video"])) for i in good]
            answers = _generate(model, processor, rows, max_new_tokens)
            found |= dict(zip(good, answers, strict=True))
    model.train(is_training)
    return [found[i] for i in range(len(questions))]


def _answer_long(model, processor, questions, videos_dir, max_new_tokens, progress):
    ends, found = stop_token_ids(model.config.template, processor.tokenizer), {}
    names = [question["video"] for question in questions]
    if None in names:
        blind_ones = [i for i, name in enumerate(names) if name is None]
        rows = [(questions[i]["question"], None) for i in blind_ones]
        answers = _generate(model, processor, rows, max_new_tokens)
        found |= dict(zip(blind_ones, answers, strict=True))
    for name in progress(sorted(set(names) - {None})):
        its = [i for i, other in enumerate(names) if other == name]
        asked = [(q["question"], q.get("query") or q["question"].split("\n")[0])
                 for q in (questions[i] for i in its)]
        try:
            said = long_video.generate(model, processor, Path(videos_dir) / name, asked,
                                       max_new_tokens)
        except VideoError as error:
            found |= {i: Answer("", error=str(error.reason)) for i in its}
            continue
        for i, one in zip(its, said, strict=True):
            tokens, log_probs = torch.tensor(one.tokens), torch.tensor(one.log_probs)
            found[i] = _to_answer(tokens, log_probs, ends, processor.tokenizer)
    return [found[i] for i in range(len(questions))]


def _encode_clip(model, processor, path: Path, timeout_s):
    """A clip as the model sees it: features (T, N, D_v), or the VideoError."""
    try:
        clip = processor.sample(path, timeout_s)
    except VideoError as error:
        return error
    pixels = processor.process_frames(clip.frames)  # (T, C, H, W)
    return model.vision_features(pixels.to(model.device, model.dtype))


def _generate(model, processor, rows: list[tuple], max_new_tokens: int) -> list[Answer]:
    """rows: (question, features (T, N, D_v) or None). One batch, padded on the left."""
    tokenizer, template = processor.tokenizer, model.config.template
    prompts, features, index = [], [], []
    for question, clip in rows:
        num_tokens = None
        if clip is not None:
            question = with_video(question)
            num_tokens = model.connector.num_tokens(clip.shape[0] * clip.shape[1])
            if not any(clip is known for known in features):
                features.append(clip)
            index.append(next(k for k, known in enumerate(features) if known is clip))
        prompts.append(encode([(question, None)], template, tokenizer, num_tokens)["input_ids"])
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts])  # (B, L)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    visual = {}
    if features:
        visual = {"video_features": features,
                  "video_index": torch.tensor(index, device=model.device)}  # fmt: skip
    ends = stop_token_ids(template, tokenizer)
    out = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **visual,
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    new = out.sequences[:, -len(out.logits) :].cpu()  # (B, new)
    logits = torch.stack(out.logits, dim=1).float()  # (B, new, V)
    chosen = logits.log_softmax(-1).gather(-1, new[..., None].to(logits.device))[..., 0].cpu()
    return [_to_answer(*row, ends, tokenizer) for row in zip(new, chosen, strict=True)]


def _to_answer(tokens, log_probs, ends: list[int], tokenizer) -> Answer:
    """Cut at the first end token; the confidence counts the end too."""
    stops = [place for place, token in enumerate(tokens.tolist()) if token in ends]
    count = stops[0] + 1 if stops else len(tokens)
    text = tokenizer.decode(tokens[:count], skip_special_tokens=True).strip()
    return Answer(text, float(log_probs[:count].sum().exp()))


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
    every = sum(counts.values(), Counter())
    answers = []
    for question in questions:
        seen = counts.get(opening(question["question"]), every)
        if question["form"] == "choice":
            votes = [seen[normalise(option)] for option in question["options"]]
            answers.append(Answer(LETTERS[int(np.argmax(votes))]))
        else:
            answers.append(Answer(min(seen, key=lambda a: (-seen[a], a), default="")))
    return answers


# ---- numbers --------------------------------------------------------------------------------


def clustered_interval(correct, clusters, level: float = 0.95) -> tuple[float, float]:
    """Interval for the share of `correct` when answers about one clip stand or fall together.

    The cluster-robust variance of the mean (Miller, "Adding Error Bars to Evals", arXiv
    2411.00640, section 2.2) gives the number of independent answers that would be as uncertain,
    between the number of clusters and of answers; with it, Wilson's score interval (1927), which
    stays inside 0..1 and does not shrink to a point at 0 or 1 (Dean & Pagano 2015).
    """
    x = np.asarray(correct, dtype=float)
    if not len(x):
        return 0.0, 1.0
    p, n = x.mean(), len(x)
    _, place = np.unique(np.asarray(clusters).astype(str), return_inverse=True)
    sums = np.bincount(place, x - p)  # of the residuals, by clip
    num = len(sums)
    variance = (sums**2).sum() / n**2 * num / max(num - 1, 1)
    effective = float(np.clip(p * (1 - p) / variance, num, n)) if variance > 0 else num
    z = NormalDist().inv_cdf(0.5 + level / 2)
    middle = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * np.sqrt(p * (1 - p) / effective + (z / effective / 2) ** 2)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


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


def summarise(records: list[dict], seed: int) -> dict[str, float | int]:
    """The flat metrics of an evaluation from the records of all CONDITIONS.

    accuracy/<part> with /low and /high for free, choice, unseen_pairs and type/<type>;
    baseline/type/<type> is the best of the three baselines, with each beside it. Clips with a
    shape-colour pair that no training clip shows are scored apart: they are in unseen_pairs alone.
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
    parts |= {f"type/{kind}": [r for r in own if r["type"] == kind] for kind in types}
    metrics = {}
    for name, rows in parts.items():
        if rows:
            metrics |= {f"accuracy/{name}{end}": round(v, 6) for end, v in accuracy(rows).items()}
    for kind in types:
        for name in CONDITIONS[1:]:
            rows = [r for r in seen[name] if r["type"] == kind]
            key = f"baseline/{name.replace(' ', '_')}/{kind}"
            metrics[key] = round(sum(r["correct"] for r in rows) / len(rows), 6)
        best = max(metrics[f"baseline/{name.replace(' ', '_')}/{kind}"] for name in CONDITIONS[1:])
        metrics[f"baseline/type/{kind}"] = best
    choice = [r for r in by["video"] if r["form"] == "choice"]
    unparsed = sum(not r["filtered_resps"][0] for r in choice) / max(1, len(choice))
    metrics |= {"unparsed_rate": round(unparsed, 6), "num_questions": len(by["video"])}
    metrics["seed"] = seed
    return metrics
