"""Long clips of the toy world: hours of scenes, and one short needle that a question is about.

A haystack is put together from clips that the world has already encoded: their packets follow each
other in a new file, nothing is encoded again, and every piece decodes to the pixels it had before.
The needle is a still scene of one thing whose colour and shape no piece of its haystack shows; only
it can answer. A distractor is a long scene of the same thing in the other size: as near to the
query as the needle. Taught in notebook 06.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tlv import world
from tlv.chat import write_conversation
from tlv.files import write_json
from tlv.mp4 import encoding_of, join, write_video

NEEDLE_FRAMES = 12  # 1.5 seconds
DISTRACTOR_FRAMES = 200


@dataclass(frozen=True)
class Piece:
    """A clip on disk and what it shows."""

    path: Path
    scene: world.Scene

    @property
    def num_frames(self) -> int:
        return self.scene.num_frames

    @cached_property
    def words(self) -> set[str]:
        """Its colours and shapes, at any time."""
        return {word for pair in self.scene.pairs() for word in pair}


@dataclass(frozen=True)
class LongClip:
    """Pieces in order, and which frames are the needle's."""

    pieces: tuple[Piece, ...]
    needle: Piece
    start: int  # the needle's first frame

    @property
    def num_frames(self) -> int:
        return sum(piece.num_frames for piece in self.pieces)

    def holds(self, frames) -> bool:
        """Is any of the frames the needle's?"""
        stop = self.start + self.needle.num_frames
        return any(self.start <= int(frame) < stop for frame in frames)


def load_pieces(card: dict, names) -> list[Piece]:
    """The clips `names` of a toy world (`tlv.card.read_card`) with their scenes.

    Those encoded otherwise than most (some duplicates are) are left out: they cannot be joined.
    Raises ValueError for a card of published data, which names no scenes.
    """
    if not card.get("truth"):
        raise ValueError(f"{card['videos_dir']}: its data card names no scenes (`truth`), and long "
                         "clips are made of a toy world's; stop at 05: `dvc repro 05_evaluation`")
    scenes = json.loads(Path(card["truth"]).read_text())["scenes"]
    kinds = {name: encoding_of(card["videos_dir"] / name) for name in names}
    usual = Counter(kinds.values()).most_common(1)[0][0]
    return [Piece(card["videos_dir"] / name, _read_scene(scenes[name]))
            for name in names if kinds[name] == usual]


def _read_scene(values: dict) -> world.Scene:
    things = tuple(world.Thing(**thing) for thing in values["things"])
    events = tuple(world.Event(**event) for event in values["events"])
    return world.Scene(values["num_frames"], things, events, tuple(values["background"]))


# ---- the parts ------------------------------------------------------------------------------


def make_needle(folder, rng: np.random.Generator, pieces=None) -> Piece:
    """Draw and encode a needle: one thing that stands still, in a place that has a name.

    Where `pieces` are given, some of them may stand beside it.
    """
    while True:
        thing = world.sample_scene(rng, num_things=1).things[0]
        still = world.Thing(thing.colour, thing.shape, thing.size, thing.x, thing.y)
        scene = world.Scene(NEEDLE_FRAMES, (still,), (), world.draw_background(rng))
        fits = pieces is None or without(pieces, [Piece(Path(), scene)])
        if fits and world.is_place_clear(thing.x, thing.y):
            return _encode(folder, scene, rng)


def make_distractor(folder, needle: Piece, rng: np.random.Generator) -> Piece:
    """Encode a long scene of the needle's thing in the other size, moving."""
    thing = needle.scene.things[0]
    size = next(size for size in world.SIZES if size != thing.size)
    x, y = (float(v) for v in rng.uniform(0, world.SIZE, 2))
    direction = str(rng.choice(list(world.DIRECTIONS)))
    speed = float(0.4 * world.SIZE / DISTRACTOR_FRAMES)
    thing = world.Thing(thing.colour, thing.shape, size, x, y, direction, speed)
    scene = world.Scene(DISTRACTOR_FRAMES, (thing,), (), world.draw_background(rng))
    return _encode(folder, scene, rng)


def _encode(folder, scene, rng) -> Piece:
    path = Path(folder) / f"{rng.bytes(6).hex()}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, world.render(scene), world.FPS)
    return Piece(path, scene)


def without(pieces, shown) -> list[Piece]:
    """The pieces that have no colour and no shape in common with those `shown`, at any time."""
    taken = {word for piece in shown for word in piece.words}
    return [piece for piece in pieces if not taken & piece.words]


# ---- the whole ------------------------------------------------------------------------------


def hide(pieces, needle: Piece, num_frames: int, depth: float, rng, others=()) -> LongClip:
    """A haystack of about `num_frames` frames with the needle at `depth` (0: start, 1: end) of it.

    Pieces are drawn without return until none is left, then again; the clip is as long as can be
    without being longer than `num_frames`. `others`, distractors or further needles, stand anywhere
    in it. Raises ValueError where nothing fits.
    """
    hay, chosen = without(pieces, [needle, *others]), list(others)
    length = num_frames - sum(piece.num_frames for piece in (needle, *others))
    if length < 0 or (not hay and length > world.MAX_SECONDS * world.FPS):
        raise ValueError(f"{len(hay)} of {len(pieces)} pieces may stand beside the needle, and "
                         f"{length} frames are left for them; there must be some, and 0 or more")
    while True:
        drawn = [hay[i] for i in rng.permutation(len(hay))]
        for piece in drawn:
            if piece.num_frames <= length:
                chosen.append(piece)
                length -= piece.num_frames
        if not any(piece.num_frames <= length for piece in hay):
            break
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    ends = np.cumsum([0, *(piece.num_frames for piece in chosen)])  # where the needle could begin
    at = int(abs(ends - depth * ends[-1]).argmin())
    return LongClip((*chosen[:at], needle, *chosen[at:]), needle, int(ends[at]))


def ask(needle: Piece) -> list[dict]:
    """Questions that the needle answers, with the word of each that says what to look for.

    The thing is named by its colour or by its shape; its name does not give the answer away. A
    single frame tells. Size is not asked: it has two answers, so guessing gets half of them.
    """
    thing = needle.scene.things[0]
    found = []
    for query, name, (kind, answer) in (
        (thing.colour, f"{thing.colour} object", ("shape", thing.shape)),
        (thing.shape, thing.shape, ("colour", thing.colour)),
    ):
        asked = ((kind, f"What {kind} is the {name}?", answer),
                 ("place", f"Where is the {name}?", world.place_name(thing.x, thing.y)))
        found += [{"type": kind, "question": text, "answer": answer, "query": query}
                  for kind, text, answer in asked]
    return found


def write_training(out_dir, pieces, *, seed: int, num_samples: int, num_needles: int,
                   num_frames: int) -> Path:
    """Write `num_needles` needles and `num_samples` LLaVA samples, and return the samples' path.

    A sample's "video" is a list of files, at most `num_frames` frames in all, a needle among them:
    the trainer shows them one after another, so that nothing is written twice and no clip comes
    twice. Most are short: in short clips the model finds out what to look for. The questions are
    those that name the needle by the sample's query.
    """
    out_dir, rng, samples = Path(out_dir), np.random.default_rng([seed, 7]), []
    needles = [make_needle(out_dir / "parts", rng, pieces) for _ in range(num_needles)]
    for _ in range(num_samples):
        needle = needles[rng.integers(num_needles)]
        length = int((num_frames - needle.num_frames) * rng.uniform() ** 2) + needle.num_frames
        clip = hide(pieces, needle, length, rng.uniform(), rng)
        files = [os.path.relpath(piece.path, out_dir) for piece in clip.pieces]
        found, query = ask(needle), str(rng.choice(needle.scene.things[0].pair))
        turns = [(q["question"], q["answer"]) for q in found if q["query"] == query]
        samples.append({"id": rng.bytes(6).hex(), "video": files, "query": query,
                        "conversations": write_conversation(turns)})
    write_json(out_dir / "train.json", samples)
    return out_dir / "train.json"


def write_test(out_dir, pieces, *, seed: int, lengths, num_depths: int, num_each: int) -> Path:
    """Write `num_each` clips for each length and depth bin, and their questions: a list in the form
    of `tlv.answering`, and beside it `query`, `depth`, `num_frames` and `needle`, its frames."""
    out_dir, rng, found = Path(out_dir), np.random.default_rng([seed, 8]), []
    for length in lengths:
        for depth_bin in np.repeat(np.arange(num_depths), num_each):
            needle = make_needle(out_dir / "parts", rng, pieces)
            depth = float(depth_bin + rng.uniform()) / num_depths
            clip = hide(pieces, needle, length, depth, rng)
            name = f"{rng.bytes(6).hex()}.mp4"
            join(out_dir / "videos" / name, [piece.path for piece in clip.pieces])
            where = [clip.start, clip.start + needle.num_frames]
            for question in ask(needle):
                head = {"id": rng.bytes(6).hex(), "video": name, "form": "free", "options": []}
                tail = {"unseen_pair": False, "num_frames": length, "depth": round(depth, 4),
                        "needle": where}
                found.append({**head, **question, **tail})
    write_json(out_dir / "questions.json", found)
    return out_dir / "questions.json"
