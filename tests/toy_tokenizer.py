"""Small tokenizers with the special tokens of published ones."""

import json
from pathlib import Path

import sentencepiece
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast


def make_tokenizer(corpus, special: dict, has_bos: bool, vocab_size: int = 400):
    """Byte-level BPE. `special` as PreTrainedTokenizerFast takes it; `has_bos`: one in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = [t for v in special.values() for t in (v if isinstance(v, list) else [v])]
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(dict.fromkeys(names)), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    if has_bos:
        return _with_bos(bpe, special)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def make_sentencepiece(corpus, special: dict, prefix: str, vocab_size: int = 700):
    """BPE as converted SentencePiece models have it: "▁" for a space, bytes for what is unknown.

    `prefix` says where a "▁" is put in front: "always", after every special token (Llama with
    legacy: true), "first", of the text alone (Llama since), or "never" (Gemma).
    """
    names = [t for v in special.values() for t in (v if isinstance(v, list) else [v])]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*names, *bytes_], show_progress=False))  # fmt: skip
    form = json.loads(bpe.to_str())
    form["added_tokens"] = [t for t in form["added_tokens"] if t["content"] in names]
    bpe = Tokenizer.from_str(json.dumps(form))
    bpe.pre_tokenizer = None  # merges may begin anywhere, as in the models themselves
    space = normalizers.Replace(" ", "▁")
    bpe.normalizer = space
    if prefix == "always":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    elif prefix == "first":
        bpe.normalizer = None
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _with_bos(bpe, special)


def _with_bos(bpe, special: dict):
    bos = special["bos_token"]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


# ---- files as they are published, without a tokenizer.json ----------------------------------


def write_sentencepiece(folder, family: str = "Llama") -> None:
    """Llama's and Gemma's: a `tokenizer.model` of 300 tokens, as SentencePiece trains it."""
    is_llama = family == "Llama"
    names = ("unk <unk>", "bos <s>", "eos </s>") if is_llama else (
        "pad <pad>", "eos <eos>", "bos <bos>", "unk <unk>")  # fmt: skip
    special = dict(name.split() for name in names)
    order = list(special)
    ids = {f"{kind}_id": order.index(kind) if kind in order else -1
           for kind in ("unk", "bos", "eos", "pad")}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["A red circle moves to the left in a park."]), model_type="bpe",
        model_prefix=str(folder / "tokenizer"), vocab_size=300, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=is_llama, minloglevel=2, **ids,
        **{f"{kind}_piece": token for kind, token in special.items()},
    )  # fmt: skip
    Path(folder, "tokenizer.vocab").unlink()
    known = {token: index for index, token in enumerate(special.values())}
    special = {f"{kind}_token": token for kind, token in special.items()}
    _write_settings(folder, f"{family}Tokenizer", {"pad_token": "<unk>"} | special, known,
                    add_bos_token=True, add_eos_token=False, legacy=False)  # fmt: skip


def write_slow(folder, tokenizer_class: str, inside=(), added=()) -> dict[str, int]:
    """Qwen2's and Phi-2's: vocab.json, merges.txt, added_tokens.json. Returns {token: id}.

    A vocabulary of bytes, "in" and "ing". Tokens may be `inside` it, or `added` behind it.
    """
    merges = ("i n", "in g")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "in", "ing", *inside]
    vocab = {token: index for index, token in enumerate(tokens)}
    behind = {token: len(vocab) + index for index, token in enumerate(added)}
    Path(folder, "vocab.json").write_text(json.dumps(vocab))
    Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    Path(folder, "added_tokens.json").write_text(json.dumps(behind))
    special = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
    known = {token: vocab[token] for token in inside} | behind
    _write_settings(folder, tokenizer_class, special, known, add_prefix_space=False)
    return vocab | behind


def _write_settings(folder, tokenizer_class, special, known, **settings):
    """tokenizer_config.json and special_tokens_map.json as transformers 4.40 wrote them."""
    flags = dict(lstrip=False, rstrip=False, single_word=False)
    decoder = {
        str(index): dict(flags, content=token, normalized=not token.strip(), special="<" in token)
        for token, index in known.items()
    }
    settings |= dict(special, tokenizer_class=tokenizer_class, added_tokens_decoder=decoder,
                     model_max_length=3072, padding_side="right")  # fmt: skip
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
    Path(folder, "special_tokens_map.json").write_text(json.dumps(special))
