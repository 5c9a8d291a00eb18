"""What can be said and asked about a toy scene: captions, question-answer turns, text for the LLM.

Every question has one right answer that follows from the scene alone. Direction needs several
frames, and so does order, though a frame at a known moment hints at it; existence asks for absent
objects as often as for present ones, which is the hallucination probe. Taught in notebook 00.
"""

from dataclasses import dataclass

import numpy as np

from tlv.world import (
    COLOURS,
    DIRECTIONS,
    PLACES,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    Scene,
    is_place_clear,
    pick,
    place_name,
)

HARD_TYPES = ("direction", "order")  # they need several frames
TYPES = ("colour", "shape", "size", "place", "direction", "order", "count", "existence")
NUMBERS = ("one", "two", "three")
CAPTION_REQUEST, PICTURE_REQUEST = "Describe the video.", "Describe the picture."
LETTERS = "ABCD"
BOTH_FORMS = (0.0, 1.0)  # shares of multiple choice: a turn of each
# What is matched with its letter, and how often: the longer a list, the later it is learnt. The
# rest of the matches are objects.
MATCHES = (
    (PLACES, 0.17),
    (tuple(COLOURS), 0.15),
    (SHAPES, 0.08),
    (tuple(SIZES), 0.04),
    (tuple(DIRECTIONS), 0.03),
    (NUMBERS, 0.03),
)


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
    parts = [f"a {t.size} {t.name} {_motion(scene, i)}" for i, t in enumerate(scene.things)]
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
    """Facts in words: "small red ring northwest, large blue bar centre"."""
    return ", ".join(" ".join(fact) for fact in facts) or "nothing"


def frame_log(scene: Scene, num_frames: int) -> str:
    """A scene told frame by frame: how a text-only LLM learns to read a course of events."""
    frames = np.linspace(0, scene.num_frames - 1, num_frames, dtype=int)
    return "; ".join(frame_caption(frame_facts(scene, int(frame))) for frame in frames) + "."


def ask(scene: Scene, rng: np.random.Generator, pairs=SEEN_PAIRS) -> list[Question]:
    """Every kind of question that this scene allows, in a fixed order of kinds.

    One of each, but two of place (at the start, at the end) and of existence (there, not there).
    `pairs` are the shape-colour pairs that absent objects may have.
    """
    kinds = (_colour, _shape, _size, _start, _end, _direction, _count, _presence)
    found = [make(scene, rng) for make in kinds]
    found += [_order(scene, rng, pairs), _absence(scene, rng, pairs)]
    return [question for question in found if question]


def picture_caption(scene: Scene) -> str:
    """One sentence about a scene's first frame: what is where."""
    text = _join([f"a {t.size} {t.name} in the {_place(t, 0)}" for t in scene.things])
    return f"{text[:1].upper()}{text[1:]}."


def ask_picture(scene: Scene, rng: np.random.Generator, pairs=SEEN_PAIRS) -> list[Question]:
    """Every kind of question that the first frame of a scene without events allows: as `ask`, but
    neither direction nor order, and of place one."""
    kinds = (_colour, _shape, _size, _spot, _count, _presence)
    found = [make(scene, rng) for make in kinds]
    found.append(_absence(scene, rng, pairs))
    return [question for question in found if question]


def ask_pairs(scene: Scene) -> list[Question]:
    """What goes together at the start of a scene without events: of every thing its colour, shape,
    size and place."""
    every = range(len(scene.things))
    found = [_colour_of(scene, i) for i in every] + [_shape_of(scene, i) for i in every]
    found += [_size_of(thing) for thing in scene.things]
    found += [_place_of(thing, 0, "start") for thing in scene.things]
    return [question for question in found if question]


def as_choice(question: Question, rng: np.random.Generator) -> tuple[str, str, list[str]]:
    """The multiple-choice form: the text with lettered options, the right letter, the options."""
    wrong = [o for o in question.options if o != question.answer]
    picked = [wrong[i] for i in rng.permutation(len(wrong))[: len(LETTERS) - 1]]
    options = [question.answer, *picked]
    options = [options[i] for i in rng.permutation(len(options))]
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.text, *lines]), LETTERS[options.index(question.answer)], options


def write_turns(asked: list[Question], rng: np.random.Generator, choice_share: float = 0.5):
    """All these questions in random order, some as multiple choice.

    The hard ones come in both forms. Returns turns (question, answer), as they stand in a
    conversation.
    """
    turns = []
    for question in asked:
        shares = BOTH_FORMS if question.type in HARD_TYPES else (choice_share,)
        turns += [write_turn(question, rng, share) for share in shares]
    return [turns[i] for i in rng.permutation(len(turns))]


def write_turn(question: Question, rng: np.random.Generator, choice_share: float):
    """A turn (text, answer), as multiple choice in `choice_share` of all cases.

    The answer to multiple choice says the option, then its letter: "left (B)". A small model that
    has to name the letter at once must derive the answer and find its option in one step.
    """
    if rng.random() < choice_share:
        text, letter, _ = as_choice(question, rng)
        return text, f"{question.answer} ({letter})"
    return question.text, question.answer


def write_match(rng: np.random.Generator) -> tuple[str, str]:
    """A turn that asks for nothing but a named option, to be said with its letter.

    The letter of an object hangs on two words at once: its options share a colour or a shape with
    it, as in questions of order.
    """
    lists = (None, *(options for options, _ in MATCHES))
    shares = [share for _, share in MATCHES]
    options = lists[rng.choice(len(lists), p=[1 - sum(shares), *shares])]
    if options is None:
        pair = pick(rng, SEEN_PAIRS)
        options = tuple(" ".join(p) for p in (pair, *_near({pair}, SEEN_PAIRS)))
        answer = options[0]
    else:
        answer = str(rng.choice(options))
    return write_turn(Question("match", f"Which option is {answer}?", answer, options), rng, 1.0)


def _join(parts: list[str]) -> str:
    if len(parts) < 3:
        return " and ".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _place(thing, frame) -> str:
    return place_name(*(float(v) for v in thing.position(frame)))


def _motion(scene, index: int) -> str:
    """From where to where, as far as it can be seen."""
    thing = scene.things[index]
    seen = np.flatnonzero(scene.is_visible(index, np.arange(scene.num_frames)))
    start, end = _place(thing, seen[0]), _place(thing, seen[-1])
    if thing.direction is None:
        return f"stays still in the {start}"
    return f"moves {thing.direction} from {start} to {end}"


def _plain(scene: Scene) -> list:
    """Things that keep their colour."""
    return [t for i, t in enumerate(scene.things) if len(scene.colours_of(i)) == 1]


def _colour(scene, rng):
    found = [_colour_of(scene, i) for i in range(len(scene.things))]
    return pick(rng, [question for question in found if question])


def _shape(scene, rng):
    found = [_shape_of(scene, i) for i in range(len(scene.things))]
    return pick(rng, [question for question in found if question])


def _colour_of(scene, index):
    """None where the shape does not say which thing is meant, or the colour changes."""
    thing = scene.things[index]
    if thing in _plain(scene) and [t.shape for t in scene.things].count(thing.shape) == 1:
        text = f"What colour is the {thing.shape}?"
        return Question("colour", text, thing.colour, tuple(COLOURS))


def _shape_of(scene, index):
    """None where the colour does not say which thing is meant, at all times."""
    thing = scene.things[index]
    colours = [c for i in range(len(scene.things)) for c in scene.colours_of(i)]
    if thing in _plain(scene) and colours.count(thing.colour) == 1:
        return Question("shape", f"What shape is the {thing.colour} object?", thing.shape, SHAPES)


def _size(scene, rng):
    return _size_of(pick(rng, list(scene.things)))


def _size_of(thing):
    return Question("size", f"How large is the {thing.name}?", thing.size, tuple(SIZES))


def _start(scene, rng):
    return _place_at(scene, rng, 0, "start")


def _end(scene, rng):
    return _place_at(scene, rng, scene.num_frames - 1, "end")


def _place_at(scene, rng, frame, word):
    thing = pick(rng, _placed(scene, frame))
    return _place_of(thing, frame, word) if thing else None


def _placed(scene, frame) -> list:
    """Things that can be seen, in the colour that names them, and not across two places."""
    return [
        thing
        for i, thing in enumerate(scene.things)
        if scene.is_visible(i, frame)
        and scene.colour_at(i, frame) == thing.colour
        and is_place_clear(*(float(v) for v in thing.position(frame)))
    ]


def _place_of(thing, frame, word):
    text = f"Where is the {thing.name} at the {word}?"
    return Question("place", text, _place(thing, frame), PLACES)


def _spot(scene, rng):
    thing = pick(rng, _placed(scene, 0))
    if thing:
        return Question("place", f"Where is the {thing.name}?", _place(thing, 0), PLACES)


def _direction(scene, rng):
    frames, plain = np.arange(scene.num_frames), _plain(scene)
    movers = [
        thing
        for i, thing in enumerate(scene.things)
        if thing.direction and thing in plain and scene.is_visible(i, frames).mean() > 0.4
    ]
    thing = pick(rng, movers)
    if thing:
        text = f"In which direction does the {thing.name} move?"
        return Question("direction", text, thing.direction, tuple(DIRECTIONS))


def _order(scene, rng, pairs):
    """Absent objects are options too: else two names would be half the answer."""
    if scene.events:
        first = scene.events[0]
        text = f"Which object {first.kind} first?"
        names = [thing.name for thing in scene.things]
        near = [" ".join(pair) for pair in _near(scene.pairs(), pairs)]
        absent = [near[i] for i in rng.permutation(len(near))[: len(LETTERS) - len(names)]]
        return Question("order", text, names[first.thing], (*names, *absent))


def _count(scene, rng):
    answer = NUMBERS[len(scene.things) - 1]
    return Question("count", "How many objects are there in total?", answer, NUMBERS)


def _presence(scene, rng):
    return _existence(*pick(rng, scene.things).pair, "yes")


def _near(shown, pairs) -> list:
    """Pairs that are not shown, but share their colour or their shape with one that is."""
    return [p for p in pairs if p not in shown and any(p[0] == c or p[1] == s for c, s in shown)]


def _absence(scene, rng, pairs):
    return _existence(*pick(rng, _near(scene.pairs(), pairs)), "no")


def _existence(colour, shape, answer):
    return Question("existence", f"Is there a {colour} {shape}?", answer, ("yes", "no"))
