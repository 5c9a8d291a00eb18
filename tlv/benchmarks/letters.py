"""Multiple choice as the benchmarks ask and read it. Taught in notebook 05."""

from collections import defaultdict

from tlv.benchmarks.question import LETTER
from tlv.evaluate import LETTERS


def ask_letter(question: str, options, form: str = "({}) {}") -> str:
    """The question, its options in lines, and the request for a letter."""
    lines = [form.format(*pair) for pair in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, LETTER])


def parse_letter(text: str, options, first_letter: bool = True, strict: bool = False) -> str | None:
    """The letter that an answer names, by the published rule; None where it names none.

    `first_letter` (TinyLLaVA-Video's five benchmarks, not MMMU) takes an answer's first character
    where it is a letter of an option, so that "Answer: B" is A. Else "(B)", else " B ", else, with
    `strict`, as MMMU's later rule, "B.", else, in answers of more than five words, an option's
    words; of several the last. Where published code then draws a letter, this gives None.
    """
    letters = LETTERS[: len(options)]
    for mark in ",.!?;:'":
        text = text.strip(mark)
    if first_letter and text[:1] in letters and text:
        return text[0]
    text = f" {text} "
    shapes = ["({})", " {} "] + ["{}."] * strict
    forms = [(text, {letter: shape.format(letter) for letter in letters}) for shape in shapes]
    if len(text.split()) > 5:
        words = {letter: option.lower() for letter, option in zip(letters, options, strict=True)
                 if option.strip()}
        forms.append((text.lower(), words))
    for where, form in forms:
        found = {letter: where.rfind(words) for letter, words in form.items()}
        last = max(found.values(), default=-1)
        if last >= 0:
            return next(letter for letter, place in found.items() if place == last)
    return None


def score_letters(questions, answers) -> dict[str, float]:
    """Accuracy over all questions and of each group, and the share of answers without a letter.

    An answer without one is wrong.
    """
    read = [parse_letter(text, q.options) for q, text in zip(questions, answers, strict=True)]
    groups = defaultdict(list)
    for question, letter in zip(questions, read, strict=True):
        groups[question.group].append(letter == question.answer)
    return {
        "accuracy": sum(map(sum, groups.values())) / len(read),
        **{f"accuracy/{name}": sum(hits) / len(hits) for name, hits in groups.items() if name},
        "unparsed_rate": sum(letter is None for letter in read) / len(read),
    }
