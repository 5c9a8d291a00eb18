"""Random gaps between the positions of video tokens: short clips teach what long ones will need.

A model trained on rows of some hundred tokens has never seen position 10,000. Gaps at random frames
let it see all positions of its context, and all distances between a question and what it is about,
at the cost of short rows. Source: randomised positions (arXiv 2305.16843), PoSE (arXiv 2309.10400).
Taught in notebook 06.
"""

import numpy as np

MAX_GAPS = 8


def spread(row: dict, is_video: list[bool], num_positions: int, rng) -> dict:
    """A row whose positions jump at up to MAX_GAPS random video tokens, and all others follow.

    row: input_ids and labels (L,), from `tlv.isolation.isolate` also segments and positions. Order
    is kept, and distances within text. The last position is uniform up to num_positions - 1.
    Raises ValueError where the row is longer than num_positions.
    """
    length = len(row["input_ids"])
    positions = np.array(row.get("positions", range(length)))  # (L,)
    free = num_positions - 1 - positions.max()
    if free < 0:
        raise ValueError(f"a row of {positions.max() + 1} positions does not fit into the LLM's "
                         f"{num_positions}")
    places = positions[np.array(is_video)]  # (S,)
    count = min(MAX_GAPS, len(places))
    if count:
        at = np.sort(rng.choice(places, count, replace=False))  # (gaps,)
        total = rng.integers(free + 1)
        jumps = np.diff(np.sort(rng.integers(total + 1, size=count - 1)), prepend=0, append=total)
        shift = np.concatenate([[0], jumps.cumsum()])  # (gaps + 1,)
        positions = positions + shift[np.searchsorted(at, positions, side="right")]  # (L,)
    return {**row, "segments": row.get("segments", [0] * length), "positions": positions.tolist()}
