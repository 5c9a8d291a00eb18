"""How published benchmarks turn answers into numbers: POPE, VQA, ScienceQA, MME, multiple choice.

As TinyLLaVA Factory and TinyLLaVA-Video score them (arXiv 2402.14289, 2501.15513), quirks kept:
scores are comparable or they are nothing. One thing is left out, the random letter for an answer
that names none; `parse_letter` gives None there. Taught in notebook 05.
"""

import re
import string
from collections import Counter, defaultdict

EPSILON = 1e-6  # in POPE's ratios
LETTERS = string.ascii_uppercase

# ---- POPE: is there an object? ----------------------------------------------------------------


def parse_yes_no(text: str) -> str:
    """"no" if the first sentence has the word No, no or not, else "yes", even if it is empty."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score_pope(answers, truths) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of "yes", of answers to one of POPE's lists.

    truths: "yes" or "no" for each answer, in the same order; "yes" is the positive class.
    """
    pairs = Counter(zip(map(parse_yes_no, answers), truths, strict=True))
    hits, misses = pairs["yes", "yes"], pairs["no", "yes"]
    false, right_no = pairs["yes", "no"], pairs["no", "no"]
    precision, recall = hits / (hits + false + EPSILON), hits / (hits + misses + EPSILON)
    return {
        "accuracy": (hits + right_no) / pairs.total(),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + EPSILON),
        "yes_ratio": (hits + false) / pairs.total(),
    }


# ---- VQA accuracy: VQAv2, TextVQA, VizWiz -----------------------------------------------------

MARKS = ";/[]\"{}()=+\\_-><@`,?!"
NUMBERS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}  # fmt: skip
CONTRACTIONS = {  # as annotators type them: as they are compared
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't couldn't could've didn't doesn't don't hadn't hasn't haven't how'd "
        "how's i'm i've isn't it'll ma'am mightn't might've mustn't must've needn't o'clock "
        "oughtn't shan't shouldn't should've that's there's they'd they'll they're they've 'twas "
        "wasn't weren't we've what'll what're what's what've when's where'd where's where've who'd "
        "who'll who's who've why'll why're why's won't wouldn't would've y'all you'd you'll you're "
        "you've"
    ).split()
}


def normalise_vqa(text: str) -> str:
    """An answer as the official evaluation compares it: no case, marks, articles; digits."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    whole = text
    for mark in MARKS:
        is_at_a_word = mark + " " in whole or " " + mark in whole
        text = text.replace(mark, "" if is_at_a_word else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def score_vqa(answer: str, truths) -> float:
    """Agreement with ten annotators: each is left out once, and three of the rest are enough.

    0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4 and more that say the same. ValueError unless ten.
    """
    if len(truths) != 10:
        raise ValueError(f"{len(truths)} annotators' answers; VQA accuracy is defined for 10")
    answer, truths = normalise_vqa(answer), [normalise_vqa(truth) for truth in truths]
    same = [truth == answer for truth in truths]
    return sum(min(1.0, (sum(same) - one) / 3) for one in same) / 10


# ---- ScienceQA --------------------------------------------------------------------------------


def parse_science(text: str) -> str | None:
    """"B", "B. an answer" or one "The answer is B."; None for anything else, which is wrong."""
    if text in LETTERS[:5] and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z])\.", text)
    return found[0] if len(found) == 1 else None


# ---- MME --------------------------------------------------------------------------------------

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")  # fmt: skip


def parse_mme(text: str) -> str:
    """"yes", "no", or "other", which is wrong."""
    text = text.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def score_mme(records) -> dict[str, float]:
    """Scores per subtask (at most 200) and the sums `perception` (2000) and `cognition` (800).

    records: (subtask, image, truth, answer). Each image has two questions; 100 for their accuracy,
    and 100 more for the share of images with both right.
    """
    images = defaultdict(lambda: defaultdict(list))
    for subtask, image, truth, answer in records:
        images[subtask][image].append(parse_mme(answer) == truth.lower())
    scores = {}
    for subtask, pairs in images.items():
        wrong = [image for image, hits in pairs.items() if len(hits) != 2]
        if wrong:
            raise ValueError(f"MME {subtask}: image {wrong[0]!r} has {len(pairs[wrong[0]])} "
                             "questions; each has two")
        accuracy = sum(map(sum, pairs.values())) / (2 * len(pairs))
        scores[subtask] = 100 * (accuracy + sum(map(all, pairs.values())) / len(pairs))
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        scores[name] = sum(scores.get(subtask, 0.0) for subtask in subtasks)
    return scores


# ---- multiple choice --------------------------------------------------------------------------


def parse_letter(text: str, options, first_letter: bool = True) -> str | None:
    """The letter that an answer names, by the published rule; None where it names none.

    `first_letter` (TinyLLaVA-Video's five benchmarks, not MMMU) takes an answer's first character
    where it is a letter of an option, so that "Answer: B" is A. Else "(B)", else " B ", else, in
    answers of more than five words, an option's words; of several the last.
    """
    letters = LETTERS[: len(options)]
    for mark in ",.!?;:'":
        text = text.strip(mark)
    if first_letter and text[:1] in letters and text:
        return text[0]
    text = f" {text} "
    forms = [{letter: form.format(letter) for letter in letters} for form in ("({})", " {} ")]
    if len(text.split()) > 5:
        text_lower = text.lower()
        forms.append(dict(zip(letters, (option.lower() for option in options), strict=True)))
    for number, form in enumerate(forms):
        where = text if number < 2 else text_lower
        found = {letter: where.rfind(words) for letter, words in form.items()}
        last = max(found.values(), default=-1)
        if last >= 0:
            return next(letter for letter, place in found.items() if place == last)
    return None
