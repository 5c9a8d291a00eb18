"""Conversations -> token ids and labels. With `tlv.templates`, what knows of special tokens.

A conversation is a list of turns (question, answer); an answer of None asks for one. A clip or a
picture stands in one question as `<video>`, in front of the words.
Taught in notebooks 03 (label mask) and 04 (several turns).
"""

import re

from tlv.templates import (
    OWN,
    TEMPLATES,
    VIDEO_TOKEN,
    ConversationError,
    Template,
    get_template,
    pieces_of,
)

IGNORE_INDEX = -100  # the label of a token that is not learnt
PLACEHOLDER = re.compile(r"<(?:video|image)>")  # in annotations both mean the same
ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1, "system": 2}


def with_video(question: str) -> str:
    """The question with one visual in front, wherever, however named and often it stood before."""
    return f"{VIDEO_TOKEN}\n{PLACEHOLDER.sub('', question).strip()}".strip()


# ---- annotations -> turns -------------------------------------------------------------------


def visual_of(sample: dict):
    """The file name of a sample's clip or picture; None for one of text alone."""
    return sample.get("image") if sample.get("video") is None else sample["video"]


def parse_conversation(sample: dict) -> list[tuple[str, str]]:
    """A LLaVA annotation -> turns, the visual moved to the front of its question as `<video>`.

    Turns at the ends from which nothing can be learnt are left out (`odd_turns` names them).
    Raises ConversationError unless human (or user) and gpt (or assistant) alternate, every turn
    has words, and the sample names a clip or picture exactly where a question holds a placeholder.
    White space around answers and around questions without a visual stays, as in published code.
    """
    name, values = sample.get("id", "(no id)"), sample.get("conversations")
    num_turns = len(values) if isinstance(values, list) else 0
    first, last = _odd_ends(sample)
    kept = range(first, num_turns - last)
    if not kept or len(kept) % 2:
        raise ConversationError(f"sample {name!r}: {num_turns or 'no'} turns; they must be human, "
                                "gpt, human, gpt ..., ending with gpt")
    texts = [_read_turn(name, index, values[index], index - first) for index in kept]
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    num_visuals = sum(PLACEHOLDER.search(text) is not None for text in texts)
    if sample.get("video") and sample.get("image"):
        raise ConversationError(f"sample {name!r} names a video and an image; a sample shows one "
                                "of them: make two samples of it")
    wanted = 1 if visual_of(sample) else 0
    if num_visuals != wanted:
        raise ConversationError(f"sample {name!r}: {num_visuals} turns with a placeholder (<video> "
                                f"or <image>), but {wanted} video or image; one of each is right")
    return [(with_video(q) if PLACEHOLDER.search(q) else q, a) for q, a in turns]


def odd_turns(sample: dict) -> list[str]:
    """What `parse_conversation` leaves out of a sample, in words.

    Published code drops the first of these without a word and stops at the second.
    """
    notes = ("the first turn is no question", "the last question has no answer")
    return [f"{note}; that turn is left out"
            for note, is_odd in zip(notes, _odd_ends(sample), strict=True) if is_odd]


def _odd_ends(sample) -> tuple[bool, bool]:
    """Does a conversation of more than two turns begin with no question (an answer, a system's
    words), and does it end with one?"""
    values = sample.get("conversations")
    roles = [_role(turn) for turn in values] if isinstance(values, list) else []
    return len(roles) > 2 and roles[0] in (1, 2), len(roles) > 2 and roles[-1] == 0


def query_of(sample: dict, turns) -> str:
    """What a sample's frames are compared with: its own `query`, or the first question's first
    line. Raises ConversationError. Taught in notebook 06."""
    query = sample.get("query")
    if not isinstance(query or "", str):
        raise ConversationError(f"sample {sample.get('id', '(no id)')!r}: query {query!r:.60} must "
                                "be text")
    return query or PLACEHOLDER.sub("", turns[0][0]).strip().split("\n")[0]


def write_conversation(turns, visual: str = "video") -> list[dict]:
    """Turns in the LLaVA form, a placeholder in front: what `parse_conversation` reads."""
    said = []
    for index, (question, answer) in enumerate(turns):
        value = question if index else f"<{visual}>\n{question}"
        said += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return said


def _speaker(turn):
    return turn.get("from") if isinstance(turn, dict) else None


def _role(turn) -> int | None:
    """0 for a question, 1 for an answer, 2 for a system's words, None for anything else."""
    speaker = _speaker(turn)
    return ROLES.get(speaker) if isinstance(speaker, str) else None


def _read_turn(name, index, turn, place) -> str:
    """The words of turn `index`, which must be a question at an even `place`, else an answer."""
    text = turn.get("value") if isinstance(turn, dict) else None
    if _role(turn) != place % 2:
        wanted = ("human (or user)", "gpt (or assistant)")[place % 2]
        raise ConversationError(f"sample {name!r}, turn {index}: from {_speaker(turn)!r}, "
                                f"must be {wanted}")
    if not isinstance(text, str) or not text.strip():
        raise ConversationError(f"sample {name!r}, turn {index}: value {text!r}, must be words")
    if place % 2 and PLACEHOLDER.search(text):
        raise ConversationError(f"sample {name!r}, turn {index}: a placeholder in an answer; "
                                "it belongs in a question")
    return text


# ---- text -> ids and labels -----------------------------------------------------------------


def prepare_tokenizer(tokenizer, template, what: str = "llm_dir"):
    """Give a published tokenizer what training needs: `<video>`, and a pad token where it has none.

    Padding is told from text by the attention mask alone, so any token will do: its own, else the
    unknown token, else the end token. (TinyLLaVA takes the unknown one for Llama, Phi and Gemma
    also where there is another.) Raises ValueError where there is none, and as `check_stop`.
    """
    if VIDEO_TOKEN not in tokenizer.get_added_vocab():
        tokenizer.add_tokens([VIDEO_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"{what}: the tokenizer has no pad, unknown or end token; name one as "
                         "pad_token in its tokenizer_config.json")
    check_stop(template, tokenizer, what)
    return tokenizer


def check_stop(template, tokenizer, what: str = "llm_dir") -> None:
    """Refuse a template whose end of an answer is not the tokenizer's.

    If it is no token, nothing would learn to stop. If it is one, the template is refused where
    another writes the same words and ends as the tokenizer does; ChatML and `plain` have no such
    twin, so they go with every tokenizer that knows their stop. A stop of white space always goes.
    """
    form, end = get_template(template), tokenizer.eos_token
    pieces = tokenizer(form.stop, add_special_tokens=False).input_ids
    fitting = [name for name, other in TEMPLATES.items() if other.stop == end]
    twins = [name for name in fitting if _words(TEMPLATES[name]) == _words(form)]
    is_token = len(pieces) == 1
    if not form.stop.strip() or (is_token and (form.stop == end or not twins)):
        return
    raise ValueError(
        f"template {template if isinstance(template, str) else OWN!r} ends an answer with "
        f"{form.stop!r}, which is "
        + ("not the end token" if is_token else f"{len(pieces)} tokens")
        + f" to the tokenizer of {what}; its own end token is {end!r}, that of "
        + (f"template {' or '.join(fitting)}" if fitting else "no template here")
        + (f"; {OWN} takes its chat template" if tokenizer.chat_template else "")
        + (f". If {form.stop!r} is right, name it as eos_token in its tokenizer_config.json"
           if is_token else "")
    )  # fmt: skip


def _words(form: Template):
    """What a template writes around questions: all but how an answer ends."""
    return form.system, form.prompt


def video_token_id(tokenizer) -> int:
    """The id of the placeholder; it may lie outside the LLM's vocabulary, it is never embedded."""
    index = tokenizer.get_added_vocab().get(VIDEO_TOKEN)
    if index is None:
        raise ValueError(f"the tokenizer has no special token {VIDEO_TOKEN}; "
                         "tlv.builders.build_model adds it")
    return index


def stop_token_ids(template, tokenizer) -> list[int]:
    """The ids at which generation ends: the template's stop, and the tokenizer's own end."""
    stop = tokenizer(get_template(template).stop, add_special_tokens=False).input_ids
    ends = [stop[0]] if len(stop) == 1 else []
    return sorted({*ends, tokenizer.eos_token_id} - {None})


def tokenize(text: str, tokenizer, add_special_tokens: bool = True) -> tuple[list, list]:
    """Token ids of a text with `<video>` in it or not, and for each token its (start, end) in it.

    What stands before and after the visual is tokenized apart, as in published code: some
    tokenizers begin each text with a space of its own.
    """
    ids, places, start = [], [], 0
    for part in text.split(VIDEO_TOKEN):
        if start:
            ids.append(video_token_id(tokenizer))
            places.append((start - len(VIDEO_TOKEN), start))
        encoded = tokenizer(part, return_offsets_mapping=True,
                            add_special_tokens=add_special_tokens and not start)  # fmt: skip
        ids += encoded.input_ids
        places += [(start + first, start + last) for first, last in encoded.offset_mapping]
        start += len(part) + len(VIDEO_TOKEN)
    return ids, places


def encode(turns, template, tokenizer, num_video_tokens=None) -> dict:
    """Turns -> {"input_ids", "labels"}, lists of equal length (L,).

    The one `<video>` becomes `num_video_tokens` placeholders (None: a conversation without). A
    token is learnt if it overlaps an answer, from the space before it to its end token; all others
    are IGNORE_INDEX.
    """
    pieces, spans, start = list(pieces_of(turns, get_template(template))), [], 0
    for piece, is_learnt in pieces:
        if is_learnt:
            spans.append((start, start + len(piece)))
        start += len(piece)
    text = "".join(piece for piece, _ in pieces)
    num_visuals = text.count(VIDEO_TOKEN)
    if num_visuals != (num_video_tokens is not None):
        raise ConversationError(f"{num_visuals} {VIDEO_TOKEN} in the conversation, but "
                                f"num_video_tokens = {num_video_tokens}: {text[:200]!r}")
    placeholder, ids, labels = video_token_id(tokenizer), [], []
    for token, place in zip(*tokenize(text, tokenizer), strict=True):
        count = num_video_tokens if token == placeholder else 1
        ids += [token] * count
        labels += [token if _overlaps(place, spans) else IGNORE_INDEX] * count
    return {"input_ids": ids, "labels": labels}


def _overlaps(place, spans) -> bool:
    """Does the token at `place` = (start, end) touch a span? Some tokenizers report a lone space
    as empty, at its end."""
    start, end = place
    if start == end:
        return any(first < start <= last for first, last in spans)
    return any(start < last and first < end for first, last in spans)
