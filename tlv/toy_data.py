"""Writes the toy world to disk: clips, raw annotations with planted defects, splits, the data card.

The folder has the shape that every later stage reads (`world.json` names its parts), whether its
content is the toy world or published data. Taught in notebook 00.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from tlv import defects, questions, world
from tlv.background import stand_back
from tlv.card import CARD, CARD_KEYS
from tlv.chat import write_conversation
from tlv.files import write_json
from tlv.mp4 import write_video
from tlv.video import is_picture


@dataclass
class Entry:
    """A clip or picture on its way to disk: its scene, its name, its bytes' story."""

    scene: world.Scene
    name: str
    defect: str | None = None
    twin: "Entry | None" = None  # of which other clip this one is a copy

    def ask(self, rng, pairs=world.SEEN_PAIRS) -> list[questions.Question]:
        ask = questions.ask_picture if is_picture(self.name) else questions.ask
        return ask(self.scene, rng, pairs)

    def tell(self) -> tuple[str, str]:
        """The turn that asks for the caption."""
        if is_picture(self.name):
            return questions.PICTURE_REQUEST, questions.picture_caption(self.scene)
        return questions.CAPTION_REQUEST, questions.caption(self.scene)


def make_world(
    out_dir, *, seed: int, num_train: int, num_val: int, num_test: int, defect_share: float
):
    """Write the whole toy world below `out_dir` and return the path of its card.

    `num_train` counts the clean raw clips; every kind of defect adds `defect_share` of that
    number. A third of the test clips show a shape-colour pair that training never shows; fewer of
    them than of the training clips show several things.
    """
    out_dir = Path(out_dir)
    (out_dir / "videos").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 0])
    names = _Names(rng)

    train = [Entry(s, names.clip()) for s in _train_scenes(rng, num_train)]
    val = [Entry(world.sample_scene(rng), names.clip()) for _ in range(num_val)]
    test = [Entry(s, names.clip()) for s in _test_scenes(rng, num_test)]
    num_defects = max(1, round(defect_share * num_train))
    planted = _plant_clips(rng, names, train, test, num_defects)
    _write_clips(out_dir / "videos", train + val + test, planted, rng)

    captions, qa, truth = _raw_samples(rng, names, train, planted, num_defects)
    write_json(out_dir / "raw_captions.json", captions)
    write_json(out_dir / "raw_qa.json", qa)
    write_json(out_dir / "val_captions.json", [_caption_sample(e, names.sample()) for e in val])
    write_json(out_dir / "val_qa.json", [_qa_sample(e, names.sample(), rng) for e in val])
    write_json(out_dir / "test_questions.json", _test_questions(rng, names, test))
    scenes = {e.name: e.scene.to_dict() for e in train + val + test + planted}
    write_json(out_dir / "truth.json", {"defects": truth, "scenes": scenes})
    card = {"seed": seed, "truth": "truth.json", "videos_dir": "videos"}
    card |= {k: f"{k}.json" for k in CARD_KEYS[1:6]}
    card |= {"vision_dir": "backbones/vision", "llm_dir": "backbones/llm"}
    write_json(out_dir / CARD, card)
    return out_dir / CARD


def make_pictures(out_dir, *, seed: int, num_train: int, num_val: int, num_test: int):
    """Write still pictures of the world below `out_dir`, and return the path of their card.

    For the image model (TinyLLaVA). No defect is planted, so `captions.json` and `qa.json` are
    training data as they stand, and the folder is its own manifest folder. The card names the
    backbones of the toy world that `out_dir` lies in.
    """
    out_dir = Path(out_dir)
    (out_dir / "pictures").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 5])
    names = _Names(rng)
    settings = dict(shares=world.TRAIN_SHARES, event_share=0.0)
    train = [Entry(world.sample_scene(rng, **settings), names.picture()) for _ in range(num_train)]
    val = [Entry(world.sample_scene(rng, event_share=0.0), names.picture()) for _ in range(num_val)]
    test = [Entry(s, names.picture()) for s in _test_scenes(rng, num_test, event_share=0.0)]
    for entry in train + val + test:
        Image.fromarray(world.render(entry.scene, [0])[0]).save(out_dir / "pictures" / entry.name)
    for prefix, entries in (("", train), ("val_", val)):
        captions = [_caption_sample(entry, names.sample()) for entry in entries]
        write_json(out_dir / f"{prefix}captions.json", captions)
        qa = [_qa_sample(entry, names.sample(), rng, 0.0 if prefix else 0.3) for entry in entries]
        write_json(out_dir / f"{prefix}qa.json", qa)
    write_json(out_dir / "test_questions.json", _test_questions(rng, names, test))
    card = {"seed": seed, "truth": "", "videos_dir": "pictures"}
    card |= {"raw_captions": "captions.json", "raw_qa": "qa.json"}
    card |= {key: f"{key}.json" for key in ("val_captions", "val_qa", "test_questions")}
    card |= {"vision_dir": "../backbones/vision", "llm_dir": "../backbones/llm"}
    write_json(out_dir / CARD, card)
    return out_dir / CARD


class _Names:
    """Random hex names, none twice: a name says nothing about its clip."""

    def __init__(self, rng):
        self.rng, self.used = rng, set()

    def _next(self) -> str:
        while (name := self.rng.bytes(6).hex()) in self.used:
            pass
        self.used.add(name)
        return name

    def clip(self) -> str:
        return f"{self._next()}.mp4"

    def picture(self) -> str:
        return f"{self._next()}.png"

    def sample(self) -> str:
        return self._next()


def _train_scenes(rng, count):
    """Clean scenes, one in twenty of them a look-alike of a defect."""
    scenes = []
    for index in range(count):
        if index % 20 == 19:
            kind = ("slow", "same_things")[index // 20 % 2]
            source = next((s for s in reversed(scenes) if len(s.things) == 1), scenes[-1])
            scenes.append(defects.look_alike(rng, kind, source))
        else:
            scenes.append(world.sample_scene(rng, shares=world.TRAIN_SHARES))
    return scenes


def _test_scenes(rng, count, event_share=1.0):
    every = world.SEEN_PAIRS + world.HELD_OUT_PAIRS
    return [
        world.sample_scene(
            rng, pairs=every, must_have=world.HELD_OUT_PAIRS, event_share=event_share
        )
        if index % 3 == 0
        else world.sample_scene(rng, event_share=event_share)
        for index in range(count)
    ]


def _plant_clips(rng, names, train, test, count):
    planted = []
    for kind in defects.CLIP_DEFECTS:
        for _ in range(count):
            twin = None
            if kind in ("duplicate", "near_duplicate", "leaked_test_clip"):
                pool = test if kind == "leaked_test_clip" else train
                twin = pool[rng.integers(len(pool))]
            if kind == "static":
                scene = defects.still_scene(rng)
            else:
                scene = twin.scene if twin else world.sample_scene(rng, shares=world.TRAIN_SHARES)
            planted.append(Entry(scene, names.clip(), kind, twin))
    return planted


def _write_clips(folder: Path, clean, planted, rng):
    """Encode every scene, then do to the planted files what their defects say."""
    jobs = [(folder / entry.name, entry.scene, 18) for entry in clean]
    for entry in planted:
        again = entry.defect == "near_duplicate" or (
            entry.defect == "leaked_test_clip" and rng.random() < 0.5
        )
        if again or not (entry.twin or entry.defect in ("unreadable", "empty")):
            jobs.append((folder / entry.name, entry.scene, 30 if again else 18))
    if len(jobs) < 200:  # sooner done than processes are started
        encoded = {_encode(job) for job in jobs}
    else:
        cores = len(os.sched_getaffinity(0))
        with ProcessPoolExecutor(cores, get_context("spawn"), stand_back) as pool:
            encoded = set(pool.map(_encode, jobs, chunksize=32))
    for entry in planted:
        path = folder / entry.name
        if entry.defect == "truncated":
            path.write_bytes(defects.truncate(path.read_bytes(), rng))
        elif path not in encoded and entry.twin:
            path.write_bytes((folder / entry.twin.name).read_bytes())
        elif path not in encoded:
            path.write_bytes(rng.bytes(3000) if entry.defect == "unreadable" else b"")


def _encode(job) -> Path:
    path, scene, crf = job
    write_video(path, world.render(scene), world.FPS, crf=crf)
    return path


def _caption_sample(entry: Entry, sample_id: str) -> dict:
    return _sample(entry, sample_id, [entry.tell()])


def _qa_sample(entry: Entry, sample_id: str, rng, caption_share: float = 0.0) -> dict:
    """Every question that the clip allows, and in `caption_share` of all cases its caption."""
    turns = questions.write_turns(entry.ask(rng), rng)
    if rng.random() < caption_share:
        turns.append(entry.tell())
    return _sample(entry, sample_id, turns)


def _sample(entry: Entry, sample_id: str, turns) -> dict:
    kind = "image" if is_picture(entry.name) else "video"
    conversations = write_conversation(turns, kind)
    return {"id": sample_id, kind: entry.name, "conversations": conversations}


def _raw_samples(rng, names, train, planted, count):
    """Annotations of the raw pool in random order, and the truth about them."""
    truth = {}
    captions, qa = [], []
    ids = {}
    for entry in train + planted:
        pair = _caption_sample(entry, names.sample()), _qa_sample(entry, names.sample(), rng, 0.3)
        ids[entry.name] = [sample["id"] for sample in pair]
        captions.append(pair[0])
        qa.append(pair[1])
    for entry in planted:
        twins = ids.get(entry.twin.name) if entry.twin else None
        for index, sample_id in enumerate(ids[entry.name]):
            truth[sample_id] = {"kind": entry.defect, "twin": twins[index] if twins else None}
    scenes = [e.scene for e in train]
    chosen = iter(rng.permutation(len(train)))  # the first samples are those of `train`, in order
    for kind in defects.TEXT_DEFECTS:
        for _ in range(count):
            index = next(chosen)
            broken = _spoil(kind, captions[index], qa[index], scenes[index], scenes, rng)
            (qa if kind == "malformed_conversation" else captions)[index] = broken
            truth[broken["id"]] = {"kind": kind, "twin": None}
    captions = [captions[i] for i in rng.permutation(len(captions))]
    qa = [qa[i] for i in rng.permutation(len(qa))]
    return captions, qa, truth


def _spoil(kind, caption, qa, scene, scenes, rng) -> dict:
    if kind == "malformed_conversation":
        return defects.malform(qa, rng)
    text = caption["conversations"][1]["value"]
    if kind == "wrong_caption":
        text = defects.other_caption(scene, scenes, rng)
    elif kind == "short_caption":
        text = str(rng.choice(defects.SHORT_CAPTIONS))
    else:
        text = defects.degenerate_caption(text, rng)
    human, gpt = caption["conversations"]
    return {**caption, "conversations": [human, {**gpt, "value": text}]}


def _test_questions(rng, names, test):
    """Each question that a test clip allows, once free-form and once as multiple choice."""
    found = []
    for entry in test:
        unseen = bool(entry.scene.pairs() & set(world.HELD_OUT_PAIRS))
        every = world.SEEN_PAIRS + world.HELD_OUT_PAIRS if unseen else world.SEEN_PAIRS
        for question in entry.ask(rng, every):
            head = {"video": entry.name, "type": question.type, "unseen_pair": unseen}
            text, letter, options = questions.as_choice(question, rng)
            found.append(
                {"id": names.sample(), **head, "form": "free", "question": question.text,
                 "answer": question.answer, "options": []}
            )  # fmt: skip
            found.append(
                {"id": names.sample(), **head, "form": "choice", "question": text,
                 "answer": letter, "options": options}
            )  # fmt: skip
    return found
