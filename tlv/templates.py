"""Templates: how the turns of a conversation become text, for each language model.

The templates `pretrain`, `phi` (Phi-2 and StableLM), `qwen2_base`, `qwen2_instruct`, `llama` and
`gemma` are TinyLLaVA Factory's and TinyLLaVA-Video's; `qwen2_chat` is ChatML with Qwen2's system
text. Any other LLM has `own`: the chat template of its tokenizer, taken apart once and kept in the
model's config. Taught in notebook 03.
"""

import re
from dataclasses import asdict, dataclass
from os.path import commonprefix

VIDEO_TOKEN = "<video>"  # what a visual is in text


class ConversationError(ValueError):
    """A conversation that cannot be used; names the sample, the turn and what would be right."""


@dataclass(frozen=True)
class Template:
    """How turns become text: system once, then prompt and answer for every turn.

    `prompt` holds {q}, the question with its visual; None: the visual alone, without the words.
    `answer` holds {a} and all that is learnt; `after` follows an answered turn and is not learnt.
    `stop` is the token that ends an answer. `between` stands in front of every turn but the first.
    """

    system: str
    prompt: str | None
    answer: str
    stop: str
    after: str = ""
    between: str = ""

    def __post_init__(self):
        for place, text in (("{q}", self.prompt), ("{a}", self.answer)):
            if text is not None and text.count(place) != 1:
                raise ValueError(f"{text!r} must hold {place} once in a template; it holds it "
                                 f"{text.count(place)} times")


_VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
           "gives helpful, detailed, and polite answers to the user's questions. ")


def _vicuna(stop: str) -> Template:
    return Template(_VICUNA, "USER: {q} ASSISTANT:", " {a}" + stop, stop)


TEMPLATES = {
    # For the toy world's small LLM: few tokens, and an answer is spelled as it stands in a text.
    "plain": Template("", "{q}\nAnswer:", " {a}<|endoftext|>", "<|endoftext|>", after="\n"),
    "pretrain": Template("", None, "{a}\n", "\n"),
    "phi": _vicuna("<|endoftext|>"),
    "qwen2_base": _vicuna("<|endoftext|>"),
    "qwen2_instruct": _vicuna("<|im_end|>"),  # the published one is no ChatML
    "llama": _vicuna("</s>"),
    "gemma": _vicuna("<eos>"),
    "qwen2_chat": Template(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
        "{a}<|im_end|>",
        "<|im_end|>",
        after="\n",
    ),
}


OWN = "own"  # the tokenizer's own chat template, until `resolve_template` has read it


def get_template(template: str | dict) -> Template:
    """A template by name, or of its fields, as a model's config holds its own; else ValueError."""
    if isinstance(template, dict):
        try:
            return Template(**template)
        except TypeError as error:
            known = ", ".join(Template.__dataclass_fields__)
            raise ValueError(f"template {template} must hold the fields {known}: {error}") from None
    if template == OWN:
        raise ValueError(f"template {OWN!r} has to be read from a tokenizer: tlv.builders."
                         "build_model and tlv.convert do, and keep it in the model's config; a "
                         "stage of training uses it where its own template is left empty (None)")
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; known are {', '.join(TEMPLATES)}, and "
                         f"{OWN}, the tokenizer's")
    return TEMPLATES[template]


# ---- turns -> text --------------------------------------------------------------------------


def render(turns, template) -> str:
    """The text of a conversation; a last answer of None leaves the prompt for it open."""
    return "".join(text for text, _ in pieces_of(turns, get_template(template)))


def pieces_of(turns, template: Template):
    """(text, is learnt) in order. Only the last answer may be None."""
    turns = list(turns)
    if any(answer is None for _, answer in turns[:-1]):
        raise ConversationError("only the last answer of a conversation may be missing")
    for index, (question, answer) in enumerate(turns):
        if template.prompt is None:
            prompt = VIDEO_TOKEN if VIDEO_TOKEN in question else ""
        else:
            prompt = template.prompt.replace("{q}", question)
        yield (template.between if index else template.system) + prompt, False
        if answer is not None:
            yield template.answer.replace("{a}", answer), True
            yield template.after, False


def is_quoted(turns, template) -> bool:
    """Do the turns hold what the template itself writes between a question and its answer, or at
    its end, or make it together with the template's words around them? Published code splits a text
    at these, and gives such a sample up or learns the wrong words.
    """
    form = get_template(template)
    if form.prompt is None:
        return False
    marks = form.prompt.split("{q}")[1] + form.answer.split("{a}")[0], form.stop
    marks = [re.compile(f"(?={re.escape(mark)})") for mark in marks if mark.strip()]  # may overlap

    def count(said) -> list[int]:
        text = "".join(piece for piece, _ in pieces_of(said, form))
        return [len(mark.findall(text)) for mark in marks]

    return count(turns) != count([("", answer and ".") for _, answer in turns])


def to_jinja(template) -> str:
    """The same template for `apply_chat_template`: messages of role and content -> `render`.

    Content is a string, or blocks of type video, image and text. With add_generation_prompt
    nothing is added: a last user message already ends in the open prompt.
    """
    form = get_template(template)
    if form.prompt is None:
        prompt = "{{ '" + VIDEO_TOKEN + "' if s.visual or '" + VIDEO_TOKEN + "' in s.text }}"
    else:
        before, after = form.prompt.split("{q}")
        prompt = (_quote(before) + "{{ '" + VIDEO_TOKEN + "\\n' if s.visual }}{{ s.text }}"
                  + _quote(after))
    if form.between:
        prompt = "{%- if not loop.first -%}" + _quote(form.between) + "{%- endif -%}" + prompt
    before, after = form.answer.split("{a}")
    answer = _quote(before) + "{{ s.text }}" + _quote(after + form.after)
    return (
        _quote(form.system)
        + "{%- for message in messages -%}"
        "{%- set s = namespace(text='', visual=false) -%}"
        "{%- if message.content is string -%}{%- set s.text = message.content -%}"
        "{%- else -%}{%- for block in message.content -%}"
        "{%- if block.type == 'text' -%}{%- set s.text = s.text + block.text -%}"
        "{%- else -%}{%- set s.visual = true -%}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
        "{%- if message.role == 'user' -%}" + prompt
        + "{%- elif message.role == 'assistant' -%}" + answer
        + "{%- else -%}{{ raise_exception('role ' ~ message.role ~ ' is unknown; known are user "
        "and assistant (the system text is fixed)') }}{%- endif -%}"
        "{%- endfor -%}"
    )  # fmt: skip


def _quote(text: str) -> str:
    """Literal text as a Jinja expression, which no whitespace control can trim."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "{{ '" + escaped + "' }}" if text else ""


# ---- the tokenizer's own template -----------------------------------------------------------

_MARKED = [(f"tlvquestion{i}", f"tlvanswer{i}") for i in range(3)]  # words no template holds


def resolve_template(template, tokenizer, what: str = "llm_dir") -> str | dict:
    """What a model's config keeps of a template: its name, or the fields of the tokenizer's own."""
    return asdict(derive_template(tokenizer, what)) if template == OWN else template


def derive_template(tokenizer, what: str = "llm_dir") -> Template:
    """The chat template of the tokenizer of `what`; ValueError where a Template cannot say it.

    Two turns of marked words are written by it and taken apart at the marks. One to three turns,
    answered and open, must then be what it writes itself; only an end token that some (Phi-3's) set
    behind a whole conversation is left out.
    """
    if not tokenizer.chat_template:
        raise _misfit(what, "there is none")
    written = _write_own(tokenizer, _MARKED[:2], what)
    marks = [mark for turn in _MARKED[:2] for mark in turn]
    parts = re.split("|".join(marks), written)
    if re.findall("|".join(marks), written) != marks:
        raise _misfit(what, "it does not show the words of each turn once and in their order")
    first, middle, turn_end, _, end = parts
    closing = "" if turn_end.startswith(end) else tokenizer.eos_token or ""
    end = end.removesuffix(closing)
    before = turn_end.removeprefix(end)
    opened = _write_own(tokenizer, [(marks[0], None)], what)
    asked = opened.removeprefix(first + marks[0])
    if not middle.startswith(asked) or middle.removeprefix(asked).strip():
        raise _misfit(what, f"it asks for an answer with {asked!r} and shows one after {middle!r}")
    stop = _find_stop(tokenizer, end)
    if stop is None:
        raise _misfit(what, f"no special token ends an answer (after it stands {end!r}), so "
                            "nothing would learn to stop")
    shared = commonprefix([first[::-1], before[::-1]])[::-1]  # how each turn starts
    ending, after = end.split(stop, 1)
    template = Template(
        first.removesuffix(shared), shared + "{q}" + asked,
        middle.removeprefix(asked) + "{a}" + ending + stop, stop, after,
        before.removesuffix(shared),
    )  # fmt: skip
    for index, (question, answer) in enumerate(_MARKED):
        for last in ((question, answer), (question, None)):
            turns = [*_MARKED[:index], last]
            wanted = _write_own(tokenizer, turns, what).removesuffix(closing)
            if render(turns, asdict(template)) != wanted:
                raise _misfit(what, "how it writes a turn depends on where the turn stands")
    return template


def _write_own(tokenizer, turns, what) -> str:
    """Turns as the tokenizer's chat template writes them, less a BOS that the tokenizer adds."""
    messages = [{"role": role, "content": text} for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True) if text is not None]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False,
                                             add_generation_prompt=turns[-1][1] is None)
    except Exception as error:  # Jinja's, or what the template itself raises
        raise _misfit(what, f"it fails: {error}") from error
    adds_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text


def _find_stop(tokenizer, end: str) -> str | None:
    """The token in `end` that ends an answer: the tokenizer's own end, or the first special one."""
    if tokenizer.eos_token and tokenizer.eos_token in end:
        return tokenizer.eos_token
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [token for token in special if token in end]
    return min(found, key=lambda token: (end.index(token), -len(token)), default=None)


def _misfit(what, why: str) -> ValueError:
    return ValueError(f"template {OWN!r} is the chat template of the tokenizer of {what}, but "
                      f"{why}; take one of {', '.join(TEMPLATES)}")
