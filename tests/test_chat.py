"""Templates, label masks and annotations."""

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tlv.chat import (
    IGNORE_INDEX,
    TEMPLATES,
    ConversationError,
    encode,
    parse_conversation,
    query_of,
    render,
    stop_token_ids,
    to_jinja,
    with_video,
    write_conversation,
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
TURNS = [("<video>\nWhat is he doing?", "Running."), ("Where?", "In a park.")]


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """One token per byte, and the special tokens of every template."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<video>", "<eos>", "<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", additional_special_tokens=special
    )


def learnt(encoded, tokenizer):
    ids = [token for token in encoded["labels"] if token != IGNORE_INDEX]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_published_strings():
    assert render(TURNS, "qwen2_base") == (
        SYSTEM + "USER: <video>\nWhat is he doing? ASSISTANT: Running.<|endoftext|>"
        "USER: Where? ASSISTANT: In a park.<|endoftext|>"
    )
    assert render(TURNS, "phi") == render(TURNS, "qwen2_base")
    assert render(TURNS, "gemma").endswith("USER: Where? ASSISTANT: In a park.<eos>")
    assert render([("<video>\nDescribe it.", "Running.")], "pretrain") == "<video>Running.\n"
    assert render([("<video>\nWhat?", None)], "qwen2_base").endswith("<video>\nWhat? ASSISTANT:")


def test_golden_masks(bytes_tokenizer):
    two = encode(TURNS, "qwen2_base", bytes_tokenizer, num_video_tokens=1)
    assert len(two["input_ids"]) == 236
    assert sum(label != IGNORE_INDEX for label in two["labels"]) == 22
    assert learnt(two, bytes_tokenizer) == " Running.<|endoftext|> In a park.<|endoftext|>"
    fused = encode(TURNS, "qwen2_base", bytes_tokenizer, num_video_tokens=8)
    assert len(fused["input_ids"]) == len(fused["labels"]) == 243
    caption = encode([("<video>\nx", "Running.")], "pretrain", bytes_tokenizer, 1)
    assert len(caption["input_ids"]) == 10
    assert learnt(caption, bytes_tokenizer) == "Running.\n"
    short = [("<video>\nDo?", "Run."), ("Where?", "Park.")]
    gemma = encode(short, "gemma", bytes_tokenizer, 1)
    assert learnt(gemma, bytes_tokenizer) == " Run.<eos> Park.<eos>"
    prompt = encode([("<video>\nDo?", None)], "qwen2_base", bytes_tokenizer, 1)
    placeholder = bytes_tokenizer.convert_tokens_to_ids("<video>")
    assert prompt["input_ids"].count(placeholder) == 1
    assert set(prompt["labels"]) == {IGNORE_INDEX}


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_the_answers_with_a_trained_tokenizer(template, tokenizer):
    """Also where answers begin with a digit, hold several bytes per letter, or quote the prompt."""
    turns = [("<video>\nHow many? ASSISTANT: no", "3"), ("Où?", "Là, 日本 🎬 USER: ASSISTANT: x")]
    form = TEMPLATES[template]
    encoded = encode(turns, template, tokenizer, 5)
    wanted = "".join(form.answer.replace("{a}", answer) for _, answer in turns)
    unknown = form.stop == "<eos>"  # not a token of this tokenizer, so text
    assert learnt(encoded, tokenizer) == wanted or unknown
    tokens = [t for t in encoded["labels"] if t != IGNORE_INDEX]
    assert set(tokens).isdisjoint({tokenizer.convert_tokens_to_ids("<video>")})
    pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
    assert all(label in (token, IGNORE_INDEX) for token, label in pairs)


def test_a_lone_space_of_a_trimming_tokenizer_is_learnt(bytes_tokenizer):
    """ByteLevel's post-processor reports a space as an empty span; it still belongs to ` 3`."""
    from tokenizers import processors

    trimming = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bytes_tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>", additional_special_tokens=["<video>"],
    )  # fmt: skip
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoded = encode([("How many?", "3")], "qwen2_base", trimming)
    assert learnt(encoded, trimming) == " 3<|endoftext|>"


def messages(turns):
    for question, answer in turns:
        blocks = [{"type": "text", "text": question.removeprefix("<video>\n")}]
        if question.startswith("<video>"):
            blocks.append({"type": "video", "path": "clip.mp4"})  # in front, wherever it is listed
        yield {"role": "user", "content": blocks}
        if answer is not None:
            yield {"role": "assistant", "content": answer}


@pytest.mark.parametrize("template", TEMPLATES)
def test_jinja_equals_render(template):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    jinja = environment.from_string(to_jinja(template))
    conversations = [
        TURNS, TURNS[1:], [TURNS[0], ("And {{ then }}?", None)], [(" it's\n\n'x' \\n ", " a \n")],
        [("<video>\nWhat? ", None)], [("<video>\n", "It {% if %} {a} {q}.")],
    ]  # fmt: skip
    for turns in conversations:
        wanted = render(turns, template)
        assert jinja.render(messages=list(messages(turns))) == wanted
        plain = [{"role": r, "content": text} for turn in turns
                 for r, text in zip(("user", "assistant"), turn, strict=True) if text is not None]
        assert jinja.render(messages=plain) == wanted


def test_visuals_and_counts_must_agree(bytes_tokenizer):
    with pytest.raises(ConversationError, match="1 <video> .* num_video_tokens = None"):
        encode(TURNS, "qwen2_base", bytes_tokenizer)
    with pytest.raises(ConversationError, match="0 <video> .* num_video_tokens = 8"):
        encode(TURNS[1:], "qwen2_base", bytes_tokenizer, 8)
    with pytest.raises(ConversationError, match="only the last answer"):
        render([("a", None), ("b", "c")], "qwen2_base")
    with pytest.raises(ValueError, match="'vicuna' is unknown; known are .*qwen2_base"):
        render(TURNS, "vicuna")


def test_stop_tokens(tokenizer):
    end, im_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    newline = tokenizer("\n").input_ids
    assert stop_token_ids("qwen2_base", tokenizer) == [end]
    assert stop_token_ids("qwen2_chat", tokenizer) == sorted([end, im_end])
    assert stop_token_ids("pretrain", tokenizer) == sorted([end, *newline])


def sample(*turns, video="a.mp4"):
    roles = ("human", "gpt") * len(turns)
    values = [t if isinstance(t, tuple) else (r, t) for r, t in zip(roles, turns, strict=False)]
    found = {"id": "s1", "conversations": [{"from": r, "value": v} for r, v in values]}
    return found | ({"video": video} if video else {})


def test_annotations_are_read():
    assert parse_conversation(sample("What?\n<image>", "This. ")) == [("<video>\nWhat?", "This.")]
    moved = parse_conversation(sample("Hi.", "Hello.", ("user", "See <video> it"), "Yes."))
    assert moved == [("Hi.", "Hello."), ("<video>\nSee  it", "Yes.")]
    assert parse_conversation(sample("Hi.", "Hello.", video=None)) == [("Hi.", "Hello.")]
    assert with_video("What <image>?") == "<video>\nWhat ?"


def test_turns_are_written_as_they_are_read():
    turns = [("What?", "A cat."), ("Where?", "Here.")]
    for kind in ("video", "image"):
        written = {"id": "s", kind: "a.mp4", "conversations": write_conversation(turns, kind)}
        assert written["conversations"][0]["value"] == f"<{kind}>\nWhat?"
        assert parse_conversation(written) == [(with_video(turns[0][0]), "A cat."), turns[1]]


@pytest.mark.parametrize("sample, question, query", [
    ({"query": "red"}, "<video>\nWhat shape is it?", "red"),
    ({}, "<video>\nWhat shape is it?\nA. square\nB. bar", "What shape is it?"),
    ({"query": ""}, "\nWhere? <image>", "Where?"),
])  # fmt: skip
def test_a_query_is_the_samples_own_or_the_question_without_options(sample, question, query):
    assert query_of(sample, [(question, None), ("And then?", None)]) == query


@pytest.mark.parametrize(
    "bad, message",
    [
        (sample(("gpt", "<video>\nA"), ("human", "b")), "turn 0: from 'gpt', must be human"),
        (sample("<video>\nA", ("human", "b")), "turn 1: from 'human', must be gpt"),
        (sample("<video>\nA"), "1 turns"),
        (sample("<video>\nA", "b", ("system", "c"), "d"), "turn 2: from 'system'"),
        (sample("<video>\n<image>\nA", "b"), "2 placeholders"),
        (sample("<video>\nA", "b", "<video> c", "d"), "2 placeholders"),
        (sample("A", "b"), "0 placeholders .* but 1 video"),
        (sample("<video>\nA", "b", video=None), "1 placeholders .* but 0 video"),
        (sample("<video>\nA", "see <image>"), "turn 1: a placeholder in an answer"),
        (sample("<video>\nA", "  "), "turn 1: value '  '"),
        (sample("<video>\nA", 5), "turn 1: value 5"),
        ({"id": "s1", "video": "a.mp4"}, "no turns"),
        ({"id": "s1", "video": "a.mp4", "conversations": ["x", "y"]}, "turn 0: from None"),
    ],
)
def test_bad_annotations_are_refused(bad, message):
    with pytest.raises(ConversationError, match="sample 's1'.*" + message):
        parse_conversation(bad)
