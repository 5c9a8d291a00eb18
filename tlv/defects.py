"""What is wrong with raw data, planted on purpose: a known kind in a known share of the raw pool.

A defect is planted in a clip (then every annotation of that clip is bad) or in one annotation.
The truth is returned apart, so that notebook 01 can score its filters; file names and order say
nothing. Beside the defects stand clean look-alikes, which a filter must keep. Taught in
notebook 01.
"""

import copy
from dataclasses import replace

import numpy as np

from tlv import questions, world

CLIP_DEFECTS = (
    "unreadable",  # random bytes under the name of a clip
    "truncated",  # a download that stopped half-way
    "empty",  # 0 bytes
    "static",  # a clip in which nothing moves or happens
    "duplicate",  # the bytes of another clip of the pool
    "near_duplicate",  # another clip of the pool, encoded again
    "leaked_test_clip",  # a clip of the test split, as it is or encoded again
)
TEXT_DEFECTS = ("wrong_caption", "short_caption", "degenerate_caption", "malformed_conversation")
KINDS = CLIP_DEFECTS + TEXT_DEFECTS

SHORT_CAPTIONS = ("", "video", "A clip.", "red", "untitled_0412.mp4", "N/A")


def still_scene(rng: np.random.Generator) -> world.Scene:
    """A scene of things at rest: the `static` defect."""
    scene = world.sample_scene(rng, event_share=0.0)
    things = tuple(replace(thing, direction=None, speed=0.0) for thing in scene.things)
    return replace(scene, things=things)


def look_alike(rng: np.random.Generator, kind: str, scene: world.Scene) -> world.Scene:
    """A clean scene that resembles a defect: `slow` almost rests, `same_things` almost repeats."""
    if kind == "slow":  # an eighth of a width over the whole clip, and nothing else happens
        other = world.sample_scene(rng, num_things=1, event_share=0.0)
        thing = replace(other.things[0], speed=other.things[0].speed / 3)
        return replace(other, things=(thing,))
    if kind == "same_things":  # the things and background of another clip, on another course
        other = world.sample_scene(rng, num_things=len(scene.things), event_share=0.0)
        things = tuple(
            replace(new, colour=old.colour, shape=old.shape)
            for old, new in zip(scene.things, other.things, strict=True)
        )
        return replace(other, things=things, background=scene.background)
    raise ValueError(f"look-alike {kind!r} is not 'slow' or 'same_things'")


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(len(data) * rng.uniform(0.3, 0.7))]


def degenerate_caption(text: str, rng: np.random.Generator) -> str:
    """A caption as a failing captioner writes it: a loop, or its own words in no order."""
    words = text.lower().replace(".", "").replace(",", "").split()
    if rng.random() < 0.5:
        start = rng.integers(len(words) - 2)
        return " ".join(words[start : start + 2] * int(rng.integers(5, 9)))
    return " ".join(words[i] for i in rng.permutation(len(words)))


def malform(sample: dict, rng: np.random.Generator) -> dict:
    """Break the form of a conversation in one of five ways seen in published data."""
    sample = copy.deepcopy(sample)
    turns = sample["conversations"]
    way = int(rng.integers(5))
    if way == 0:  # two human turns in a row
        turns.insert(0, dict(turns[0]))
    elif way == 1:  # the last answer is missing
        turns.pop()
    elif way == 2:  # an answer that says nothing
        turns[-1]["value"] = "  "
    elif way == 3:  # roles that no template knows
        for turn in turns:
            turn["from"] = {"human": "Q", "gpt": "A"}[turn["from"]]
    else:  # a second placeholder, in an answer
        turns[-1]["value"] = "<video>\n" + turns[-1]["value"]
    return sample


def other_caption(scene: world.Scene, scenes: list, rng: np.random.Generator) -> str:
    """The caption of a clip that shares no shape-colour pair with this one."""
    while True:
        other = scenes[rng.integers(len(scenes))]
        if not other.pairs() & scene.pairs():
            return questions.caption(other)
