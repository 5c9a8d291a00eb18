"""Is a data card's folder complete, and are its annotations usable? `python -m tlv.validate CARD`

A card (data/*.json) names the parts that the pipeline reads: clips, LLaVA-form annotations, the
encoder's and the LLM's folder; pair_dir where the encoder is no image-text pair. Everything is
looked at before anything is trained, and every problem is named with its file, its sample and what
would be right. Taught in notebook 01.
"""

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from transformers import AutoImageProcessor, AutoTokenizer

from tlv.ahead import read_ahead
from tlv.card import CARD, load_card, read_card
from tlv.chat import visual_of
from tlv.config import ConfigError, load_json, resolve
from tlv.manifest import check_question, check_sample
from tlv.pretrained import ModelFolderError, check_weights, load_part, read_config
from tlv.selector import FRAME_S, check_pair
from tlv.video import VideoError
from tlv.video_child import sample_frames_within

MANIFESTS = ("raw_captions", "raw_qa", "val_captions", "val_qa")
FOLDERS = {"vision_dir": (AutoImageProcessor,), "llm_dir": (AutoTokenizer,),
           "pair_dir": (AutoImageProcessor, AutoTokenizer)}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What is wrong with one part of the data, or with one sample of it."""

    part: str  # a key of the card
    reason: str


def check_card(path, decode: bool = False) -> tuple[list[Problem], Counter]:
    """All problems of a card, and how many samples each part holds.

    The paths of a world's own card, world.json, count from its folder. `decode` also reads a frame
    of every clip, on every core one at a time. ConfigError if the card itself cannot be read.
    """
    path = Path(path)
    card = read_card(path.parent) if path.name == CARD and path.is_file() else load_card(path)
    problems, counts, lists, broken = [], Counter(), {}, set()
    videos = resolve(card["videos_dir"])
    if not videos.is_dir():
        problems.append(Problem("videos_dir", f"{videos}: no such folder"))
    for part in FOLDERS:
        folder = resolve(card.get(part, card["vision_dir"]))  # pair_dir may be left out
        if folder in broken:  # an encoder that is the pair too
            continue
        try:
            _check_folder(folder, part, FOLDERS[part])
        except ModelFolderError as error:
            problems.append(Problem(part, str(error)))
            broken.add(folder)
    for part in (*MANIFESTS, "test_questions"):
        try:
            samples = load_json(resolve(card[part]))
        except ConfigError as error:
            problems.append(Problem(part, str(error)))
            continue
        if not isinstance(samples, list) or not samples:
            problems.append(Problem(part, f"{card[part]}: must be a JSON list with some samples"))
            continue
        lists[part] = samples
        counts[part] = len(samples)
    files = (file for samples in lists.values() for s in samples for file in _files_of(s))
    reasons = _look_at_all({file for file in files if _is_name(file)}, videos, decode)
    for part, samples in lists.items():
        check = check_question if part == "test_questions" else check_sample
        for number, sample in enumerate(samples):
            try:
                check(sample)
                _check_visual(sample, reasons)
            except ValueError as error:
                problems.append(Problem(part, f"#{number}: {error}"))
    return problems, counts


def _check_folder(path: Path, part: str, loaders) -> None:
    """A model's folder is whole: config, every file of the weights, and what `loaders` load."""
    read_config(path, part)
    check_weights(path, part)
    if part == "pair_dir":
        check_pair(path, part)
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # reads what should be in it, and its length
                pass
        except Exception as error:
            raise ModelFolderError(f"{part} = {path}: {file.name} is torn or no safetensors file; "
                                   "copy it again") from error
    for loader in loaders:
        load_part(loader, path, part, **{"backend": "pil"} if loader is AutoImageProcessor else {})


def _files_of(sample) -> list:
    """What a sample says its clips or pictures are, whatever it is; of what is no sample: none."""
    found = visual_of(sample) if isinstance(sample, dict) else None
    return [] if found is None else found if isinstance(found, list) else [found]


def _is_name(file) -> bool:
    return isinstance(file, str) and file != ""


def _check_visual(sample, reasons: dict) -> None:
    """Every file of the sample is there and, if they were decoded, gave a frame."""
    files = _files_of(sample)
    if not all(map(_is_name, files)):
        raise ValueError(f"video {visual_of(sample)!r:.60} must be a file name relative to "
                         "videos_dir, or a list of some")
    for file in files:
        if reasons[file]:
            raise ValueError(reasons[file])


def _look_at_all(files: set, videos: Path, decode: bool) -> dict[str, str]:
    """What is wrong with each of the files, {name: reason or ""}; each is tried once."""
    names = sorted(files)
    num_readers = len(os.sched_getaffinity(0)) if decode else 1
    looks = read_ahead(lambda name: _look_at(name, videos / name, decode), names, num_readers)
    return dict(zip(names, looks, strict=True))


def _look_at(file: str, path: Path, decode: bool) -> str:
    """What is wrong with a clip or picture; nothing: ""."""
    try:
        if not path.is_file():
            return f"{file}: not in videos_dir"
        if decode:
            sample_frames_within(FRAME_S, path, num_frames=1)
    except VideoError as error:
        return f"{file}: {error.reason}"
    except OSError as error:  # a name that is too long
        return f"{file:.60}: {error.strerror}"
    return ""


def main(arguments=None) -> int:
    """Print what was found; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tlv.validate", description=__doc__)
    parser.add_argument("card", help="such as data/own.json")
    parser.add_argument("--decode", action="store_true", help="also read a frame of every clip")
    options = parser.parse_args(arguments)
    try:
        problems, counts = check_card(options.card, options.decode)
    except ConfigError as error:
        print(error)
        return 1
    print(json.dumps(counts, indent=1))
    for part, number in Counter(problem.part for problem in problems).items():
        print(f"{part}: {number} problems, such as")
        for problem in [p for p in problems if p.part == part][:3]:
            print(f"  {problem.reason}")
    print("no problems" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
