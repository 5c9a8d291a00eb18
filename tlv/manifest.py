"""Files of samples: manifests in LLaVA's form to train on, and test questions.

Taught in notebooks 01 and 05.
"""

from tlv.chat import odd_turns, parse_conversation, query_of
from tlv.config import ConfigError, load_json

QUESTION_KEYS = ("id", "video", "type", "form", "question", "answer", "options", "unseen_pair")


def load_samples(path) -> list[dict]:
    """Read a manifest: a JSON list of LLaVA samples, at least one. Raises ConfigError."""
    samples = load_json(path)
    if not isinstance(samples, list) or not samples:
        raise ConfigError(f"{path}: must be a JSON list with at least one sample")
    return samples


def load_questions(path) -> list[dict]:
    """Test questions, each with all that notebook 05 asks of one. Raises ConfigError."""
    questions = load_samples(path)
    for number, question in enumerate(questions):
        try:
            check_question(question)
        except ValueError as error:
            raise ConfigError(f"{path}: #{number}: {error}") from error
    return questions


def check_sample(sample) -> None:
    """Raise ValueError for what is no sample in LLaVA form."""
    if not isinstance(sample, dict):
        raise ValueError(f"{sample!r:.60} is no JSON object")
    turns = parse_conversation(sample)
    if odd := odd_turns(sample):
        raise ValueError(f"sample {sample.get('id', '(no id)')!r}: {'; '.join(odd)}")
    query_of(sample, turns)


def check_question(question) -> None:
    """Raise ValueError for a question that lacks a part, or has a wrong one."""
    has = question if isinstance(question, dict) else {}
    lacking = [key for key in QUESTION_KEYS if key not in has]
    if lacking:
        raise ValueError(f"lacks {', '.join(lacking)}; a question has {', '.join(QUESTION_KEYS)}")
    if question["form"] not in ("free", "choice"):
        raise ValueError(f"form {question['form']!r} must be 'free' or 'choice'")
    for key in ("video", "type", "question", "answer"):
        if not isinstance(question[key], str) or not question[key].strip():
            raise ValueError(f"{key} {question[key]!r:.60} must be text")
    options = question["options"]
    if not isinstance(options, list) or not all(isinstance(o, str) and o for o in options):
        raise ValueError(f"options {options!r:.60} must be a list of texts, [] for a free answer")
    letters = [chr(ord("A") + n) for n in range(len(question["options"]))]
    if question["form"] == "choice" and question["answer"] not in letters:
        raise ValueError(f"answer {question['answer']!r} must be one of the letters "
                         f"{', '.join(letters)} of its {len(letters)} options")
