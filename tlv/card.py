"""The data card: a JSON file that names the parts of a data set, the toy world's or one's own.

Taught in notebook 00.
"""

from pathlib import Path

from tlv.config import ConfigError, load_json

CARD_KEYS = (
    "videos_dir", "raw_captions", "raw_qa", "val_captions", "val_qa", "test_questions",
    "vision_dir", "llm_dir",
)  # fmt: skip
OTHER_KEYS = ("pair_dir", "truth", "pictures", "seed")  # a card may have them


def read_card(folder) -> dict:
    """The data card of a world folder, its paths made absolute. Errors name what is missing.

    `pair_dir` is an image-text pair (SigLIP, CLIP), which filters clips and chooses frames; where a
    card does not name one, it is the encoder's folder.
    """
    path = Path(folder) / "world.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no data card; run notebook 00 first (or `dvc repro`)")
    card = load_card(path)
    card.setdefault("pair_dir", card["vision_dir"])
    for key in (*CARD_KEYS, "pair_dir", "truth"):
        if card.get(key):
            card[key] = Path(folder) / card[key]  # an absolute path stays as it is
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
    for key in (*CARD_KEYS, "pair_dir", "truth"):
        is_unknown = key == "truth" and card.get(key) is None
        if not is_unknown and not isinstance(card.get(key, ""), str):
            raise ConfigError(f"{path}: {key} = {card[key]!r:.60} must be a path in quotes")
    return card
