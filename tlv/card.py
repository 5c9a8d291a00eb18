"""The data card: a JSON file that names the parts of a data set, the toy world's or one's own.

Taught in notebook 00.
"""

import hashlib
import os
from pathlib import Path

from tlv import ROOT
from tlv.config import ConfigError, load_json
from tlv.files import write_json

CARD = "world.json"  # a world folder's own
CARD_KEYS = (
    "videos_dir", "raw_captions", "raw_qa", "val_captions", "val_qa", "test_questions",
    "vision_dir", "llm_dir",
)  # fmt: skip
PATH_KEYS = (*CARD_KEYS, "pair_dir", "truth")
OTHER_KEYS = ("pair_dir", "truth", "pictures", "seed")  # a card may have them


def read_card(folder) -> dict:
    """The data card of a world folder, its paths made absolute. Errors name what is missing.

    `pair_dir` is an image-text pair (SigLIP, CLIP), which filters clips and chooses frames; where a
    card does not name one, it is the encoder's folder.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no data card; run notebook 00 first (or `dvc repro`)")
    card = load_card(path)
    card.setdefault("pair_dir", card["vision_dir"])
    for key in PATH_KEYS:
        if card.get(key):  # an absolute path stays as it is; ".." is of names, whatever is a link
            card[key] = Path(os.path.normpath(Path(folder) / card[key]))
    return card


def load_card(path) -> dict:
    """A data card as it stands in its file, with every part named. Raises ConfigError."""
    card = load_json(path)
    names = ", ".join(CARD_KEYS)
    if not isinstance(card, dict):
        raise ConfigError(f"{path}: {card!r:.60} is no JSON object; a card names {names}")
    if missing := [key for key in CARD_KEYS if not card.get(key)]:
        raise ConfigError(f"{path}: lacks {', '.join(missing)}; a card names {names}")
    if unknown := [key for key in card if key not in CARD_KEYS + OTHER_KEYS]:
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; a card names {names}, and may name "
                          f"{', '.join(OTHER_KEYS)}")
    for key in PATH_KEYS:
        is_unknown = key == "truth" and card.get(key) is None
        if not is_unknown and not isinstance(card.get(key, ""), str):
            raise ConfigError(f"{path}: {key} = {card[key]!r:.60} must be a path in quotes")
    return card


def adopt_card(card_path, folder) -> None:
    """Make a card of data that exists already the card of a world folder.

    Paths inside the project are told from `folder`, so that they are equal in every clone. Beside
    it, digests.json says what annotations and weights are (clips are not looked at): DVC, which
    watches the folder, runs again what read others.
    """
    card, folder = load_card(ROOT / card_path), Path(folder)
    paths = {key: ROOT / card[key] for key in PATH_KEYS if card.get(key)}
    own = {key: os.path.relpath(path, folder) if path.is_relative_to(ROOT) else str(path)
           for key, path in paths.items()}  # fmt: skip
    write_json(folder / CARD, card | own)
    write_json(folder / "digests.json", {key: _digests(path) for key, path in paths.items()
                                         if key != "videos_dir"})


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of those in a model's folder; of what is not there, nothing."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: _digest(file) for file in files if file.is_file()}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
