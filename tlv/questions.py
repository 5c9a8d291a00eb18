"""What can be said and asked about a toy scene: captions, question-answer turns, text for the LLM.

Every question has one right answer that follows from the scene alone. Direction and order need
several frames; existence asks for absent objects as often as for present ones, which is the
hallucination probe. Taught in notebook 00.
"""

from dataclasses import dataclass

import numpy as np

from tlv.world import COLOURS, DIRECTIONS, SEEN_PAIRS, SHAPES, SIZES, Scene, place_name

TYPES = ("colour", "shape", "size", "direction", "order", "count", "existence")
NUMBERS = ("one", "two", "three")
CAPTION_REQUEST = "Describe the video."
LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """A question, its answer, and every answer that could be meant (for the choice form)."""

    type: str
    text: str
    answer: str
    options: tuple[str, ...]


def event_text(scene: Scene, event) -> str:
    return f"the {scene.things[event.thing].name} {event.kind}"


def caption(scene: Scene) -> str:
    """Two sentences at most: who moves where, and what happens in which order."""
    parts = [f"a {thing.size} {thing.name} {_motion(scene, thing)}" for thing in scene.things]
    text = f"{_join(parts)}."
    if scene.events:
        told = []
        for event in scene.events:
            name = scene.things[event.thing].name
            told.append(
                f"the {name} turns {event.colour}" if event.colour else event_text(scene, event)
            )
        text += f" first {told[0]}, then {told[1]}."
    return ". ".join(s[:1].upper() + s[1:] for s in text.split(". "))


def frame_facts(scene: Scene, frame: int) -> list[tuple[str, str, str, str]]:
    """What one frame shows: size, colour, shape and place of each thing that can be seen."""
    return [
        (thing.size, scene.colour_at(i, frame), thing.shape, _place(thing, frame))
        for i, thing in enumerate(scene.things)
        if scene.is_visible(i, frame)
    ]


def frame_caption(facts) -> str:
    """Facts in words: "small red ring top left, large blue bar centre"."""
    return ", ".join(" ".join(fact) for fact in facts) or "nothing"


def frame_log(scene: Scene, num_frames: int) -> str:
    """A scene told frame by frame: how a text-only LLM learns to read a course of events."""
    frames = np.linspace(0, scene.num_frames - 1, num_frames, dtype=int)
    return "; ".join(frame_caption(frame_facts(scene, int(frame))) for frame in frames) + "."


def ask(scene: Scene, rng: np.random.Generator, pairs=SEEN_PAIRS) -> list[Question]:
    """Every kind of question that this scene allows, in a fixed order of kinds.

    One of each, but two of order (first, last) and two of existence (there, not there).

    `pairs` are the shape-colour pairs that the absent object may have.
    """
    kinds = (_colour, _shape, _size, _direction, _first, _last, _count, _presence)
    found = [make(scene, rng) for make in kinds]
    found.append(_absence(scene, rng, pairs))
    return [question for question in found if question]


def as_choice(question: Question, rng: np.random.Generator) -> tuple[str, str, list[str]]:
    """The multiple-choice form: the text with lettered options, the right letter, the options."""
    wrong = [o for o in question.options if o != question.answer]
    picked = [wrong[i] for i in rng.permutation(len(wrong))[: len(LETTERS) - 1]]
    options = [question.answer, *picked]
    options = [options[i] for i in rng.permutation(len(options))]
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.text, *lines]), LETTERS[options.index(question.answer)], options


def write_turns(scene: Scene, rng: np.random.Generator, choice_share: float = 0.5):
    """Every question that the scene allows, in random order, some as multiple choice.

    Those of order come in both forms, since only scenes with events have them. Returns turns
    (question, answer), as they stand in a conversation.
    """
    turns = []
    for question in ask(scene, rng):
        shares = (0.0, 1.0) if question.type == "order" else (choice_share,)
        turns += [write_turn(question, rng, share) for share in shares]
    return [turns[i] for i in rng.permutation(len(turns))]


def write_turn(question: Question, rng: np.random.Generator, choice_share: float):
    """A turn (text, answer), as multiple choice in `choice_share` of all cases."""
    if rng.random() < choice_share:
        return as_choice(question, rng)[:2]
    return question.text, question.answer


def write_match(rng: np.random.Generator) -> tuple[str, str]:
    """A turn that asks for nothing but the letter of a named option."""
    options = _pick(rng, (tuple(COLOURS), SHAPES, tuple(SIZES), tuple(DIRECTIONS), NUMBERS))
    answer = str(rng.choice(options))
    question = Question("match", f"Which option is {answer}?", answer, tuple(options))
    return as_choice(question, rng)[:2]


def _join(parts: list[str]) -> str:
    if len(parts) < 3:
        return " and ".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _place(thing, frame) -> str:
    return place_name(*(float(v) for v in thing.position(frame)))


def _motion(scene, thing) -> str:
    start, end = _place(thing, 0), _place(thing, scene.num_frames - 1)
    if thing.direction is None:
        return f"stays still at {start}"
    return f"moves {thing.direction} from {start} to {end}"


def _pick(rng, items):
    return items[rng.integers(len(items))] if items else None


def _plain(scene: Scene) -> list:
    """Things that keep their colour."""
    return [t for i, t in enumerate(scene.things) if len(scene.colours_of(i)) == 1]


def _colour(scene, rng):
    shapes = [t.shape for t in scene.things]
    thing = _pick(rng, [t for t in _plain(scene) if shapes.count(t.shape) == 1])
    if thing:
        return Question(
            "colour", f"What colour is the {thing.shape}?", thing.colour, tuple(COLOURS)
        )


def _shape(scene, rng):
    colours = [c for i in range(len(scene.things)) for c in scene.colours_of(i)]
    thing = _pick(rng, [t for t in _plain(scene) if colours.count(t.colour) == 1])
    if thing:
        return Question("shape", f"What shape is the {thing.colour} object?", thing.shape, SHAPES)


def _size(scene, rng):
    thing = _pick(rng, list(scene.things))
    return Question("size", f"How large is the {thing.name}?", thing.size, tuple(SIZES))


def _direction(scene, rng):
    frames = np.arange(scene.num_frames)
    movers = [
        thing
        for i, thing in enumerate(scene.things)
        if thing.direction and scene.is_visible(i, frames).mean() > 0.4
    ]
    thing = _pick(rng, movers)
    if thing:
        text = f"In which direction does the {thing.name} move?"
        return Question("direction", text, thing.direction, tuple(DIRECTIONS))


def _first(scene, rng):
    return _order(scene, rng, "first", 0)


def _last(scene, rng):
    return _order(scene, rng, "last", -1)


def _order(scene, rng, word, place):
    if scene.events:
        told = [event_text(scene, event) for event in scene.events]
        named = [told[i] for i in rng.permutation(2)]
        text = f"Which happens {word}: {named[0]} or {named[1]}?"
        return Question("order", text, told[place], tuple(named))


def _count(scene, rng):
    answer = NUMBERS[len(scene.things) - 1]
    return Question("count", "How many objects are there in total?", answer, NUMBERS)


def _presence(scene, rng):
    return _existence(*_pick(rng, scene.things).pair, "yes")


def _absence(scene, rng, pairs):
    """The absent object shares its colour or its shape with one that is there."""
    shown = scene.pairs()
    near = [p for p in pairs if p not in shown and any(p[0] == c or p[1] == s for c, s in shown)]
    return _existence(*_pick(rng, near), "no")


def _existence(colour, shape, answer):
    return Question("existence", f"Is there a {colour} {shape}?", answer, ("yes", "no"))
