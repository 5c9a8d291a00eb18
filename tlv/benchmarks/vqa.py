"""VQA accuracy, of TextVQA, VQAv2 and VizWiz: agreement with ten annotators."""

import re

MARKS = ";/[]\"{}()=+\\_-><@`,?!"
NUMBERS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}  # fmt: skip
CONTRACTIONS = {  # one apostrophe left out, as annotators type them: as they are compared
    word[:place] + word[place + 1 :]: word
    for word in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've "
        "hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am "
        "mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at "
        "shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
        "someone'd someone'd've someone'll someone's something'd something'd've something'll "
        "that's there'd there'd've there're there's they'd they'd've they'll they're they've "
        "'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd "
        "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've "
        "wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
    ).split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # a slip of the published table


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
