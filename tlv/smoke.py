"""What a notebook needs from earlier ones, at smoke scale, made on the spot where it is missing.

With default parameters a notebook reads and writes `outputs/scratch/` alone. Any notebook can be
opened first: each function here returns a folder, and makes it in seconds if nothing is there,
saying so. Outside scratch a missing folder is an error: that input comes from a pipeline stage.
What was made stays when the code changes: `make clean` deletes it.
Taught in notebook 00.
"""

import fcntl
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from tlv import ROOT
from tlv.card import CARD, read_card

SCRATCH = ROOT / "outputs" / "scratch"
# Notebook 00's defaults: whoever makes the smoke world first, it is the same one.
WORLD = dict(seed=0, num_train=40, num_val=6, num_test=12, defect_share=0.025)
BACKBONES = dict(seed=0, vision_steps=3, llm_steps=3, num_texts=120)
# Notebook 02's defaults.
MODEL = dict(
    seed=0, num_frames=8, num_queries=32, num_groups=8, num_resampler_layers=2, resampler_heads=4,
    resampler_head_dim=32, template="plain", max_seq_len=1024,
)  # fmt: skip


def world(folder) -> Path:
    """The toy world of notebook 00, `world/` below its folder."""
    return _find_or_make(
        folder, CARD, "a small toy world with hardly trained backbones", _world
    )


def manifest(folder) -> Path:
    """The manifests of notebook 01, captions.json and qa.json."""
    return _find_or_make(folder, "qa.json", "a manifest of the clean samples", _manifest)


def model(folder) -> Path:
    """The untrained model of notebook 02, in `model/` below its folder."""
    return _find_or_make(folder, "model/config.json", "an untrained model", _model)


def checkpoint(folder) -> Path:
    """The trained model of notebook 03 or 04, in `checkpoint/`; at smoke scale an untrained one."""
    what = "an untrained model in place of a trained one"
    return _find_or_make(folder, "checkpoint/config.json", what, _checkpoint)


def _find_or_make(folder, sign: str, what: str, make) -> Path:
    folder = ROOT / folder
    if not (folder / sign).is_file():
        if not folder.is_relative_to(SCRATCH):
            if (folder.parent / sign).is_file():  # the model's own folder in place of its stage's
                raise FileNotFoundError(f"{folder / sign} is missing: take {folder.parent}")
            raise FileNotFoundError(
                f"{folder / sign} is missing: run the notebook that writes it, or `dvc repro`"
            )
        print(f"nothing in {folder.relative_to(ROOT)} yet: making {what} (smoke scale)")
        _make_whole(folder, sign, make)
    return folder


def _make_whole(folder: Path, sign: str, make) -> None:
    """Beside its place first, and `sign` last: what was broken off is made again.

    Two notebooks may be at it at once: each makes its own, and the first one's stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as draft:
        make(Path(draft))
        with _locked(folder.parent):
            if (folder / sign).is_file():
                return
            folder.mkdir(exist_ok=True)
            for part in sorted(Path(draft).iterdir(), key=lambda p: p.name == Path(sign).parts[0]):
                if (folder / part.name).is_dir():
                    shutil.rmtree(folder / part.name)
                part.replace(folder / part.name)


@contextmanager
def _locked(folder: Path):
    """Alone with a folder, among those that ask this way; a process that dies lets go."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _world(folder: Path):
    from tlv.backbones import train_backbones
    from tlv.toy_data import make_world

    training = train_backbones(folder / "backbones", **BACKBONES)
    make_world(folder, **WORLD)
    training.wait()


def _manifest(folder: Path):
    from tlv.files import write_json

    card = read_card(world(SCRATCH / "00_toy_world/world"))
    defects = json.loads(card["truth"].read_text())["defects"]
    for name in ("captions", "qa"):
        raw = json.loads(card[f"raw_{name}"].read_text())
        write_json(folder / f"{name}.json", [s for s in raw if s["id"] not in defects])


def _model(folder: Path):
    from tlv.builders import build_model

    card = read_card(world(SCRATCH / "00_toy_world/world"))
    built, processor = build_model(card["vision_dir"], card["llm_dir"], **MODEL)
    built.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def _checkpoint(folder: Path):
    made = model(SCRATCH / "02_architecture") / "model"
    shutil.copytree(made, folder / "checkpoint", dirs_exist_ok=True)
