"""VQA accuracy, of TextVQA, VQAv2 and VizWiz: agreement with ten annotators."""

import re

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
