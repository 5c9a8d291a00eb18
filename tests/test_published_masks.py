"""Label masks against the published rule, on 200 made-up conversations per template.

The rule below is TinyLLaVA Factory's: it counts tokens of rounds that are cut at the end token, and
gives a sample up where the counts do not add up. Ours reads offsets. Where the published rule keeps
a sample, both must agree; where it gives up, ours must still be right.
"""

import numpy as np
import pytest
from toy_tokenizer import make_sentencepiece, make_tokenizer

from tlv.chat import IGNORE_INDEX, encode, prepare_tokenizer, video_token_id
from tlv.templates import TEMPLATES, is_quoted, render

SEPARATOR = " ASSISTANT: "
WORDS = ["cat", "dog", "park", "runs", "the", "a", "3", "42", "no", "yes.", "l'été", "日本", "USER",
         "red", "blue,", "(two)", "first", "🎬"]  # fmt: skip
LLAMA = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
GEMMA = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
# template: special tokens, has a BOS; of byte-level BPE
TOKENIZERS = {
    "phi": (dict(eos_token="<|endoftext|>", unk_token="<|endoftext|>"), False),
    "qwen2_base": (dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>"), False),
    "qwen2_instruct": (dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"), False),
    "llama": (LLAMA, True),
    "gemma": (GEMMA, True),
}
# name: template, special tokens, where a space is put in front; in SentencePiece's form
SENTENCEPIECE = {
    "llama, legacy": ("llama", LLAMA, "always"),
    "llama": ("llama", LLAMA, "first"),
    "gemma": ("gemma", GEMMA, "never"),
}


def corpus_of(template):
    rng = np.random.default_rng(0)
    return [render([(words(rng), words(rng))] * 2, template) for _ in range(50)]


def tokenizer_of(template):
    special, has_bos = TOKENIZERS[template]
    made = make_tokenizer(corpus_of(template), special, has_bos, 500)
    return prepare_tokenizer(made, template)


def words(rng, low=1, high=7):
    return " ".join(rng.choice(WORDS, size=rng.integers(low, high)))


def conversation(rng):
    turns = [(words(rng), words(rng, 0)) for _ in range(rng.integers(1, 5))]
    if rng.random() < 0.1:  # an answer that quotes the separator
        turns[-1] = (turns[-1][0], words(rng) + SEPARATOR + words(rng))
    return [(f"<video>\n{turns[0][0]}", turns[0][1]), *turns[1:]]


def published_ids(text, tokenizer):
    """TinyLLaVA's: the texts around the visual are tokenized apart; of all BOS the first stays."""
    parts = [tokenizer(part).input_ids for part in text.split("<video>")]
    num_bos = int(parts[0][:1] == [tokenizer.bos_token_id])
    ids = parts[0][:]
    for part in parts[1:]:
        ids += [video_token_id(tokenizer), *part[num_bos:]]
    return ids


def published_labels(prompt, ids, tokenizer, stop, has_bos, num_extra=0):
    """Labels of `ids` by the published rule, and whether it gave the sample up.

    num_extra: tokens that a later round has more when it stands alone; for a Llama tokenizer that
    is not legacy the rule subtracts one.
    """
    bos = int(has_bos)

    def count(text):
        return len(published_ids(text, tokenizer))

    labels = list(ids)
    total = sum(token != tokenizer.pad_token_id for token in ids)
    if tokenizer.pad_token == stop:
        total += prompt.count(stop)
    place = bos
    labels[:place] = [IGNORE_INDEX] * place
    for number, part in enumerate(prompt.split(stop)):
        extra = num_extra if number else 0
        halves = part.split(SEPARATOR)
        if not part or len(halves) != 2:
            break
        masked = count(halves[0] + SEPARATOR) - 1 - bos - extra
        labels[place : place + masked] = [IGNORE_INDEX] * masked
        place += count(part) - bos + 1 - extra
    labels[place:] = [IGNORE_INDEX] * (len(labels) - place)
    if place != total:
        return [IGNORE_INDEX] * len(labels), True
    return labels, False


@pytest.mark.parametrize("template", TOKENIZERS)
def test_masks_equal_the_published_rule(template):
    compare(template, tokenizer_of(template), TOKENIZERS[template][1])


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_masks_equal_the_published_rule_with_sentencepiece(name):
    template, special, prefix = SENTENCEPIECE[name]
    corpus = [text.replace(" USER", "").replace("USER", "\nUSER") for text in corpus_of(template)]
    made = make_sentencepiece(corpus, special, prefix)
    tokenizer, num_extra = prepare_tokenizer(made, template), int(prefix == "first")
    # As Llama's own: "USER" is one token after an end token, more where a text begins with it.
    stop = TEMPLATES[template].stop
    alone, after = (tokenizer.tokenize(text) for text in ("USER", f"{stop}USER"))
    assert len(alone) - len(after[1:]) == num_extra
    compare(template, tokenizer, True, num_extra)


def compare(template, tokenizer, has_bos, num_extra=0):
    rng, stop, num_given_up, num_quoting = np.random.default_rng(1), TEMPLATES[template].stop, 0, 0
    for _ in range(200):
        turns = conversation(rng)
        row, prompt = encode(turns, template, tokenizer, 1), render(turns, template)
        wanted, given_up = published_labels(
            prompt, row["input_ids"], tokenizer, stop, has_bos, num_extra
        )
        assert row["input_ids"] == published_ids(prompt, tokenizer)
        is_quoting = SEPARATOR in turns[-1][1]
        assert given_up == is_quoting == is_quoted(turns, template)
        num_given_up, num_quoting = num_given_up + given_up, num_quoting + is_quoting
        if not given_up:
            assert row["labels"] == wanted
        learnt = tokenizer.decode([i for i in row["labels"] if i != IGNORE_INDEX])
        assert learnt == "".join(f" {answer}{stop}" for _, answer in turns)
    assert 5 < num_given_up == num_quoting < 50


@pytest.mark.parametrize("name", [*TOKENIZERS, *SENTENCEPIECE])
def test_pretraining_masks_the_visual_alone_as_published(name):
    """Of each tokenizer: as many tokens as `<image>` has, with the BOS where there is one."""
    template, special, prefix = SENTENCEPIECE.get(name, (name, None, None))
    if name in SENTENCEPIECE:
        made = make_sentencepiece(corpus_of(template), special, prefix)
        tokenizer = prepare_tokenizer(made, template)
    else:
        tokenizer = tokenizer_of(template)
    rng, num_masked = np.random.default_rng(2), 1 + TOKENIZERS[template][1]
    for _ in range(200):
        caption = words(rng)
        row = encode([("<video>\nDescribe it.", caption)], "pretrain", tokenizer, 1)
        ids = published_ids(f"<video>{caption}\n", tokenizer)
        assert row["input_ids"] == ids
        assert row["labels"] == [IGNORE_INDEX] * num_masked + ids[num_masked:]
        assert tokenizer.decode(ids[num_masked:]).strip() == caption


def test_rendered_strings_of_every_published_template():
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
    )
    stops = {"phi": "<|endoftext|>", "qwen2_base": "<|endoftext|>", "qwen2_instruct": "<|im_end|>",
             "llama": "</s>", "gemma": "<eos>"}  # fmt: skip
    turns = [("<video>\nWhat is it?", "A cat."), ("Is it red?", "no")]
    for template, stop in stops.items():
        assert render(turns, template) == (
            f"{system}USER: <video>\nWhat is it? ASSISTANT: A cat.{stop}"
            f"USER: Is it red? ASSISTANT: no{stop}"
        )
        assert render([("Is it red?", None)], template) == f"{system}USER: Is it red? ASSISTANT:"
    assert render(turns[:1], "pretrain") == "<video>A cat.\n"
