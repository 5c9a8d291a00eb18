"""Templates, label masks and annotations."""

import copy

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_tokenizer import make_tokenizer
from transformers import PreTrainedTokenizerFast

from tlv.chat import (
    IGNORE_INDEX,
    check_stop,
    encode,
    odd_turns,
    parse_conversation,
    prepare_tokenizer,
    query_of,
    stop_token_ids,
    visual_of,
    with_video,
    write_conversation,
)
from tlv.templates import (
    TEMPLATES,
    ConversationError,
    derive_template,
    get_template,
    is_quoted,
    render,
    resolve_template,
    to_jinja,
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
    form, tokenizer = TEMPLATES[template], copy.deepcopy(tokenizer)
    if form.stop.strip():  # </s> and <eos> are tokens to the LLMs of these templates
        tokenizer.add_tokens([form.stop], special_tokens=True)
    encoded = encode(turns, template, tokenizer, 5)
    wanted = "".join(form.answer.replace("{a}", answer) for _, answer in turns)
    assert learnt(encoded, tokenizer) == wanted
    tokens = [t for t in encoded["labels"] if t != IGNORE_INDEX]
    (stop,) = tokenizer(form.stop).input_ids
    assert tokens.count(stop) == len(turns) and tokens[-1] == stop
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


def test_a_picture_beside_an_empty_video_is_the_samples_visual():
    """Tables written as JSON have every column in every row."""
    sample = {"video": None, "image": "x.jpg", "conversations": write_conversation([("Q", "A")])}
    assert visual_of(sample) == "x.jpg" and parse_conversation(sample)
    assert visual_of({"video": "x.mp4", "image": None}) == "x.mp4"
    assert visual_of({"video": None}) is None and visual_of({"image": None}) is None


def test_a_sample_that_names_a_clip_and_a_picture_is_refused():
    """One of them would be dropped without a word."""
    sample = {"id": "s", "video": "x.mp4", "image": "x.jpg",
              "conversations": write_conversation([("Q", "A")])}
    with pytest.raises(ConversationError, match="'s' names a video and an image"):
        parse_conversation(sample)


def test_visuals_and_counts_must_agree(bytes_tokenizer):
    with pytest.raises(ConversationError, match="1 <video> .* num_video_tokens = None"):
        encode(TURNS, "qwen2_base", bytes_tokenizer)
    with pytest.raises(ConversationError, match="0 <video> .* num_video_tokens = 8"):
        encode(TURNS[1:], "qwen2_base", bytes_tokenizer, 8)
    with pytest.raises(ConversationError, match="only the last answer"):
        render([("a", None), ("b", "c")], "qwen2_base")
    with pytest.raises(ValueError, match="'vicuna' is unknown; known are .*qwen2_base"):
        render(TURNS, "vicuna")


def test_the_string_of_qwen2_chat_in_full():
    assert render(TURNS, "qwen2_chat") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<video>\nWhat is he doing?<|im_end|>\n"
        "<|im_start|>assistant\nRunning.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n"
        "<|im_start|>assistant\nIn a park.<|im_end|>\n"
    )
    assert render([TURNS[0], ("Where?", None)], "qwen2_chat") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<video>\nWhat is he doing?<|im_end|>\n"
        "<|im_start|>assistant\nRunning.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# ---- the tokenizer's own template -----------------------------------------------------------

CHATML = (  # as Qwen2.5's tokenizers hold it, without the branches for tools
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
ZEPHYR = (
    "{% for message in messages %}\n"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (  # an end token behind the whole conversation
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] "
    "+ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
BRACES = "{{ '{q} {a} {0} {} {{ x }} {% y %}\n' }}" + ZEPHYR  # a system text that looks like code
LLAMA_TOKENS = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
GEMMA_TOKENS = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
                    additional_special_tokens=["<start_of_turn>", "<end_of_turn>"])  # fmt: skip
PHI_TOKENS = dict(eos_token="<|endoftext|>", additional_special_tokens=["<|end|>"])
OWN = {  # chat template, special tokens, BOS in front; what is learnt of an answer "x", and after
    "zephyr": (ZEPHYR, LLAMA_TOKENS, True, "x</s>", "\n"),
    "llama_2": (LLAMA_2, LLAMA_TOKENS, True, " x </s>", ""),
    "llama_2, no BOS added": (LLAMA_2, LLAMA_TOKENS, False, " x </s>", ""),
    "gemma": (GEMMA, GEMMA_TOKENS, True, "x<end_of_turn>", "\n"),
    "gemma, no BOS added": (GEMMA, GEMMA_TOKENS, False, "x<end_of_turn>", "\n"),
    "phi_3": (PHI_3, PHI_TOKENS, False, "x<|end|>", "\n"),
    "braces": (BRACES, LLAMA_TOKENS, True, "x</s>", "\n"),
}


def own_tokenizer(chat_template, special, has_bos):
    tokenizer = make_tokenizer(["What is he doing? Running. In a park."], special, has_bos)
    tokenizer.chat_template = chat_template
    return tokenizer


def test_an_own_chatml_is_the_built_in_one(tokenizer):
    """Strings, ids and label masks; also through what the processor keeps as its chat template."""
    chatml = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>", "<video>"],
        chat_template=CHATML,
    )  # fmt: skip
    own = resolve_template("own", chatml)
    assert get_template(own) == TEMPLATES["qwen2_chat"]
    assert resolve_template("qwen2_chat", chatml) == "qwen2_chat"
    for turns in (TURNS[:1], TURNS, [TURNS[0], ("Where?", None)]):
        assert render(turns, own) == render(turns, "qwen2_chat")
        assert encode(turns, own, chatml, 3) == encode(turns, "qwen2_chat", chatml, 3)
    assert to_jinja(own) == to_jinja("qwen2_chat")
    assert stop_token_ids(own, chatml) == [chatml.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("case", OWN)
def test_an_own_template_writes_what_the_tokenizers_writes(case):
    """One to three turns, answered and open; every BOS once; learnt is the answer with its stop."""
    chat_template, special, has_bos, learns, after = OWN[case]
    tokenizer = own_tokenizer(chat_template, special, has_bos)
    own = resolve_template("own", tokenizer)
    prepare_tokenizer(tokenizer, own)
    assert (own["answer"], own["after"]) == (learns.replace("x", "{a}"), after)
    writes_bos = "bos_token" in chat_template
    bos = tokenizer.bos_token if has_bos and writes_bos else ""  # left to the tokenizer
    first = [tokenizer.bos_token_id] * (has_bos and not writes_bos)
    jinja = ImmutableSandboxedEnvironment().from_string(to_jinja(own))
    three = [("What is {he} doing?", "Running."), ("Where?", "In {a} {{ park }}."), ("So?", "3")]
    for count in (1, 2, 3):
        for last in (three[count - 1], (three[count - 1][0], None)):
            turns = [*three[: count - 1], last]
            said = [{"role": r, "content": text} for turn in turns
                    for r, text in zip(("user", "assistant"), turn, strict=True) if text]
            theirs = tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=last[1] is None
            )
            if case == "phi_3" and last[1]:
                theirs = theirs.removesuffix("<|endoftext|>")
            assert bos + render(turns, own) == theirs
            assert jinja.render(messages=said) == render(turns, own)
            row = encode(turns, own, tokenizer)
            assert row["input_ids"] == first + tokenizer(theirs, add_special_tokens=False).input_ids
            wanted = "".join(learns.replace("x", answer) for _, answer in turns if answer)
            assert learnt(row, tokenizer) == wanted
    seen = encode([("<video>\nWhere?", "Here.")], own, tokenizer, 4)
    assert learnt(seen, tokenizer) == learns.replace("x", "Here.")
    stop = tokenizer.convert_tokens_to_ids(own["stop"])
    assert stop_token_ids(own, tokenizer) == sorted({stop, tokenizer.eos_token_id})


COUNTING = LLAMA_2.replace("[INST] '", "[INST] ' + loop.index ~ '. '")
SHOUTING = "{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}"
ENDLESS = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
THINKING = ZEPHYR + "{% if add_generation_prompt %}{{ '\n<think>\n' }}{% endif %}"
PICKY = "{{ raise_exception('a system message must come first') }}"


@pytest.mark.parametrize("chat_template, why", [
    (None, "there is none"),
    (PICKY, "it fails: a system message must come first"),
    (SHOUTING, "does not show the words of each turn once and in their order"),
    (COUNTING, "how it writes a turn depends on where the turn stands"),
    (THINKING, "it asks for an answer with .*<think>.* and shows one after "),
    (ENDLESS, "no special token ends an answer .*'.n'.* learn to stop"),
])  # fmt: skip
def test_an_own_template_that_does_not_fit_says_why(chat_template, why):
    tokenizer = own_tokenizer(chat_template, LLAMA_TOKENS, False)
    with pytest.raises(ValueError, match=f"(?s)'own' .*of here, but .*{why}.*; take one of plain"):
        derive_template(tokenizer, "here")


def test_a_template_that_is_not_read_yet_or_not_whole_is_refused():
    with pytest.raises(ValueError, match="'own' has to be read from a tokenizer: .*build_model"):
        render(TURNS, "own")
    with pytest.raises(ValueError, match="must hold the fields system, prompt.*'system'"):
        get_template({"prompt": "{q}", "answer": "{a}", "stop": "</s>"})
    with pytest.raises(ValueError, match="'q' must hold {q} once in a template; it holds it 0"):
        get_template({"system": "", "prompt": "q", "answer": "{a}", "stop": "</s>"})


# ---- ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("template, end, fitting", [
    ("qwen2_base", "<|im_end|>", "qwen2_instruct or qwen2_chat"),
    ("phi", "<|im_end|>", "qwen2_instruct or qwen2_chat"),
    ("qwen2_instruct", "<|endoftext|>", "plain or phi or qwen2_base"),
    ("llama", "<|endoftext|>", "plain or phi or qwen2_base"),
])  # fmt: skip
def test_a_template_with_another_end_than_the_tokenizers_is_refused(template, end, fitting):
    stop = TEMPLATES[template].stop
    tokenizer = make_tokenizer(["x"], dict(eos_token=end, additional_special_tokens=[stop]), False)
    message = (f"template '{template}' ends an answer with '{stop}', which is not the end token to "
               f"the tokenizer of here; its own end token is '{end}', that of template {fitting}. "
               f"If '{stop}' is right, name it as eos_token in its tokenizer_config.json")
    with pytest.raises(ValueError) as caught:
        check_stop(template, tokenizer, "here")
    assert str(caught.value) == message
    tokenizer.eos_token = stop
    check_stop(template, tokenizer)


@pytest.mark.parametrize("template, end", [
    ("qwen2_chat", "<|endoftext|>"),  # ChatML on a base model: its turns end as they are written
    ("qwen2_chat", "</s>"), ("plain", "<|im_end|>"), ("pretrain", "<|im_end|>"),
    ("qwen2_base", "<|extra|>"),  # nothing here would be better
])  # fmt: skip
def test_an_end_that_is_the_templates_own_goes_with_every_tokenizer(template, end):
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokenizer = make_tokenizer(["x"], dict(eos_token=end, additional_special_tokens=special), False)
    check_stop(template, tokenizer)
    stops = stop_token_ids(template, tokenizer)
    wanted = [tokenizer.eos_token_id, *tokenizer(TEMPLATES[template].stop).input_ids]
    assert stops == sorted(set(wanted))


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
    assert parse_conversation(sample("What?\n<image>", "This.")) == [("<video>\nWhat?", "This.")]
    moved = parse_conversation(sample("Hi.", "Hello.", ("user", "See <video> it"), "Yes."))
    assert moved == [("Hi.", "Hello."), ("<video>\nSee  it", "Yes.")]
    assert parse_conversation(sample("Hi.", "Hello.", video=None)) == [("Hi.", "Hello.")]
    assert with_video("What <image>?") == "<video>\nWhat ?"


@pytest.mark.parametrize("asked, answered, wanted", [
    # What TinyLLaVA Factory makes of them: white space goes beside a visual, and there alone.
    ("<image>\nWhat?", "This. \n", "USER: <video>\nWhat? ASSISTANT: This. \n</s>"),
    (" What? \n<image> ", " This", "USER: <video>\nWhat? ASSISTANT:  This</s>"),
    ("<image>", "A cat.", "USER: <video> ASSISTANT: A cat.</s>"),
    ("<image>\nWhat <image>?", "This.", "USER: <video>\nWhat ? ASSISTANT: This.</s>"),
])  # fmt: skip
def test_annotations_become_the_published_strings(asked, answered, wanted):
    turns = parse_conversation(sample(asked, answered))
    assert render(turns, "llama").partition("USER")[2] == wanted[4:]
    (text_only,) = parse_conversation(sample(" Why?\n", "So.", video=None))
    assert render([text_only], "llama").endswith("USER:  Why?\n ASSISTANT: So.</s>")


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


def test_a_query_that_is_no_text_is_named():
    with pytest.raises(ConversationError, match="sample 's': query 7 must be text"):
        query_of({"id": "s", "query": 7}, [("Where?", None)])


@pytest.mark.parametrize(
    "bad, message",
    [
        (sample(("gpt", "<video>\nA"), ("human", "b")), "turn 0: from 'gpt', must be human"),
        (sample("<video>\nA", ("human", "b")), "turn 1: from 'human', must be gpt"),
        (sample("<video>\nA"), "1 turns"),
        (sample("<video>\nA", "b", ("system", "c"), "d"), "turn 2: from 'system'"),
        (sample("<video>\nA", "b", "<video> c", "d"), "2 turns with a placeholder"),
        (sample("A", "b"), "0 turns with a placeholder .* but 1 video"),
        (sample("<video>\nA", "b", video=None), "1 turns with a placeholder .* but 0 video"),
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


@pytest.mark.parametrize(
    "before, after, words",
    [
        ([("gpt", "Hello.")], [], ["the first turn is no question"]),
        ([("system", "Be brief.")], [], ["the first turn is no question"]),
        ([], [("human", "And then?")], ["the last question has no answer"]),
        ([("gpt", "Hello.")], [("human", "Then?")], ["the first turn", "the last question"]),
        ([], [], []),
    ],
)
def test_turns_at_the_ends_from_which_nothing_is_learnt_are_left_out_and_named(
    before, after, words
):
    odd = sample(*before, ("human", "<video>\nA"), ("gpt", "b"), *after)
    assert parse_conversation(odd) == [("<video>\nA", "b")]
    notes = odd_turns(odd)
    assert len(notes) == len(words)
    assert all(note.startswith(word) for note, word in zip(notes, words, strict=True))


def test_an_open_question_left_out_changes_no_label(bytes_tokenizer):
    """Masked or left out: a last question without an answer gives no token to learn."""
    turns = [("<video>\nWhat is he doing?", "Running.")]
    kept, whole = (encode(t, "qwen2_base", bytes_tokenizer, 1) for t in (
        turns, [*turns, ("Where?", None)]))
    num = len(kept["labels"])
    assert whole["input_ids"][:num] == kept["input_ids"] and whole["labels"][:num] == kept["labels"]
    assert set(whole["labels"][num:]) == {IGNORE_INDEX}


@pytest.mark.parametrize("place", ["question", "answer"])
@pytest.mark.parametrize("template, words, is_found", [
    ("phi", "He said ASSISTANT: no.", True), ("phi", "a<|endoftext|>b", True),
    ("gemma", "a<|endoftext|>b", False), ("phi", "my ASSISTANT", False),
    ("qwen2_chat", "x<|im_end|>", True), ("pretrain", "two\nlines", False)])  # fmt: skip
def test_words_of_the_template_in_a_turn_are_found(template, words, is_found, place):
    turn = (f"<video>\n{words}", "Yes.") if place == "question" else ("<video>\nWhat?", words)
    assert is_quoted([turn], template) == is_found


@pytest.mark.parametrize("question", ["ASSISTANT: who?", "Repeat: ASSISTANT:"])
def test_words_of_the_template_may_form_where_a_turn_meets_them(question):
    assert is_quoted([(question, "Yes.")], "phi")
    assert not is_quoted([(question.replace("ASSISTANT", "assistant"), "Yes.")], "phi")
