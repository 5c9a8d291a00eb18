"""What the tiny backbones learn from: texts for the LLM, captioned frames for the encoder.

Scenes of their own, drawn while training runs, without the held-out pairs. Taught in notebook 00.
"""

from functools import partial

import numpy as np

from tlv import questions, world

WORDS = (*world.SIZES, *world.COLOURS, *world.SHAPES, *world.PLACES)
PHRASES = (  # the shortest captions
    *((word,) for word in WORDS),
    *world.SEEN_PAIRS,
    *((size, colour) for size in world.SIZES for colour in world.COLOURS),
)


LESSONS = (  # until which share of the training: what is taught, and how often
    (0.12, {"letters": 1.0}),
    (0.22, {"letters": 0.25, "frame": 0.75}),
    (0.30, {"letters": 0.25, "motion": 0.75}),
    (0.41, {"letters": 0.1, "motion": 0.1, "leaves": 0.8}),
    (0.52, {"letters": 0.1, "motion": 0.1, "leaves": 0.2, "changes colour": 0.6}),
    (0.60, {"letters": 0.06, "frame": 0.14, "motion": 0.1, "events": 0.15, "events of three": 0.2,
            "one thing": 0.35}),
    (1.00, {"letters": 0.06, "frame": 0.09, "motion": 0.09, "events": 0.12,
            "events of three": 0.18, "all": 0.46}),
)


def write_lesson(rng: np.random.Generator, progress: float) -> list[tuple[str, str]]:
    """Turns about one text, each to be answered alone, for a moment of training from 0 to 1.

    Skills are taught alone first, each in few steps: naming the letter of an option, telling which
    things go with which attributes, comparing places at different times, telling which thing left
    first and which changed first. Taught among everything else they would not be learnt at all.
    Letters never stop: what is no longer practised is forgotten.
    """
    shares = next(shares for end, shares in LESSONS if progress < end or end == 1.0)
    return WRITERS[rng.choice(list(shares), p=list(shares.values()))](rng)


def _write_letters(rng) -> list[tuple[str, str]]:
    return [questions.write_match(rng) for _ in range(4)]


def _write_frame(rng) -> list[tuple[str, str]]:
    """One frame of several things: what goes together in it, what is there and what is not."""
    scene = world.sample_scene(rng, num_things=int(rng.integers(2, 4)), event_share=0.0)
    pairs = questions.ask_pairs(scene)
    asked = [question for question in questions.ask(scene, rng) if question.type == "existence"]
    asked += [pairs[i] for i in rng.permutation(len(pairs))[:4]]
    return _about(questions.frame_log(scene, 1), asked, rng)


def _write_motion(rng) -> list[tuple[str, str]]:
    """One thing, frame by frame: where it is first and last, which way it moves."""
    scene = world.sample_scene(rng, num_things=1)
    asked = questions.ask(scene, rng)
    direction, place = ([q for q in asked if q.type == kind] for kind in ("direction", "place"))
    told = questions.frame_log(scene, 4)
    return _about(told, direction, rng, questions.BOTH_FORMS) + _about(told, place, rng)


def _write_events(
    rng, kinds=world.EVENTS, num_things=2, choice_shares=questions.BOTH_FORMS
) -> list[tuple[str, str]]:
    """Things frame by frame: to which of them does it happen first."""
    scene = world.sample_scene(rng, num_things=num_things, event_share=1.0, kinds=kinds)
    asked = [q for q in questions.ask(scene, rng) if q.type == "order"]
    return _about(questions.frame_log(scene, 6), asked, rng, choice_shares)


def _write_one_thing(rng) -> list[tuple[str, str]]:
    return _write_all(rng, num_things=1, num_frames=4)


def _write_all(rng, num_things=None, num_frames=6) -> list[tuple[str, str]]:
    """A scene, frame by frame or as a caption; what is hard about it, and some of the rest.

    A few of the scenes are then told again, as a caption.
    """
    scene = world.sample_scene(rng, num_things=num_things or int(rng.choice([1, 2, 2, 3])))
    is_log = rng.random() < 0.85
    told = questions.frame_log(scene, num_frames) if is_log else questions.caption(scene)
    asked = questions.ask(scene, rng)
    hard = [q for q in asked if q.type in questions.HARD_TYPES]
    rest = [q for q in asked if q.type not in questions.HARD_TYPES]
    turns = _about(told, hard, rng, questions.BOTH_FORMS)
    turns += _about(told, [rest[i] for i in rng.permutation(len(rest))[:3]], rng)
    if is_log and rng.random() < 0.1:
        turns.append((f"{told}\n{questions.CAPTION_REQUEST}", questions.caption(scene)))
    return turns


def _about(told: str, asked, rng, choice_shares=(0.5,)) -> list[tuple[str, str]]:
    turns = [questions.write_turn(one, rng, share) for share in choice_shares for one in asked]
    return [(f"{told}\n{text}", answer) for text, answer in turns]


WRITERS = {
    "letters": _write_letters,
    "frame": _write_frame,
    "motion": _write_motion,
    "leaves": partial(_write_events, kinds=("leaves",), choice_shares=(0.0,)),
    "changes colour": partial(_write_events, kinds=("changes colour",), choice_shares=(0.0,)),
    "events": partial(_write_events, kinds=("leaves", "changes colour")),  # what appears is easy
    "events of three": partial(_write_events, num_things=3),
    "one thing": _write_one_thing,
    "all": _write_all,
}


def write_frames(rng: np.random.Generator, count: int, num_things: int | None = None):
    """Frames for the vision encoder, (count, H, W, 3) uint8, and for each the facts it shows."""
    frames, facts = [], []
    for _ in range(count):
        scene = world.sample_scene(rng, num_things=num_things or int(rng.integers(1, 4)))
        frame = int(rng.integers(scene.num_frames))
        frames.append(world.render(scene, [frame])[0])
        facts.append(questions.frame_facts(scene, frame))
    return np.stack(frames), facts


def write_captions(facts) -> tuple[list[str], np.ndarray]:
    """Captions of a batch of frames, and which are true of which: (captions, frames) bool.

    One caption of each frame tells all. Beside them stand the shortest captions there are, single
    words such as "ring" or "north", each true of many frames. From these the encoder learns in
    a few hundred steps what it would otherwise have to untangle from whole captions.
    """
    captions = [questions.frame_caption(one) for one in facts]
    truth = [[caption == other for other in captions] for caption in captions]
    truth += [[any(set(p) <= set(fact) for fact in one) for one in facts] for p in PHRASES]
    return captions + [" ".join(phrase) for phrase in PHRASES], np.array(truth)
