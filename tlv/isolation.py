"""Many turns about one thing in one row, none of which sees another.

Every question so is answered as if it were asked alone, and what they are asked about, a clip or a
text, is computed once. Taught in notebook 04.
"""

from itertools import takewhile

import torch

from tlv.chat import IGNORE_INDEX


def isolate(rows: list[dict]) -> dict:
    """Rows of input_ids and labels that begin alike, as one row in which no turn sees another.

    Beside input_ids and labels it holds, for each token, `segments` (0: the shared beginning,
    k: row k) and `positions`, those that the token had in its own row.
    """
    # The first token of a row is never predicted; here another turn's last may stand before it.
    rows = [{**row, "labels": [IGNORE_INDEX, *row["labels"][1:]]} for row in rows]
    columns = zip(*(row["input_ids"] for row in rows), strict=False)
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    # The token before an answer predicts its first one, so each row keeps its own.
    shared = min(shared, *(_first_label(row) - 1 for row in rows))
    row = {"input_ids": rows[0]["input_ids"][:shared], "labels": rows[0]["labels"][:shared],
           "segments": [0] * shared, "positions": list(range(shared))}  # fmt: skip
    for number, one in enumerate(rows, start=1):
        length = len(one["input_ids"])
        row["input_ids"] += one["input_ids"][shared:]
        row["labels"] += one["labels"][shared:]
        row["segments"] += [number] * (length - shared)
        row["positions"] += range(shared, length)
    return row


def _first_label(row: dict) -> int:
    labels = row["labels"]
    return next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def pad_rows(rows: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows, isolated or plain, padded on the right: input_ids, labels (R, L) and attention_mask.

    Where one is isolated, the mask is (R, 1, L, L) and position_ids (R, L) stand beside it.
    """
    length = max(len(row["input_ids"]) for row in rows)

    def pad(values, fill):
        return torch.tensor([list(v) + [fill] * (length - len(v)) for v in values])  # (R, L)

    sizes = [len(row["input_ids"]) for row in rows]
    if any("segments" in row for row in rows):
        each = list(zip(rows, sizes, strict=True))
        segments = pad([row.get("segments", [0] * size) for row, size in each], -1)
        look = {
            "attention_mask": isolation_mask(segments),
            "position_ids": pad([row.get("positions", range(size)) for row, size in each], 0),
        }
    else:
        look = {"attention_mask": pad([[1] * size for size in sizes], 0)}
    return {
        "input_ids": pad([row["input_ids"] for row in rows], pad_id),
        "labels": pad([row["labels"] for row in rows], IGNORE_INDEX),
        **look,
    }


def isolation_mask(segments: torch.Tensor) -> torch.Tensor:
    """segments (R, L), -1 where padded -> which token may look at which, (R, 1, L, L) bool.

    Backwards only, at the own turn and at the shared beginning. Padding looks at itself: a token
    that may look at nothing gives NaN.
    """
    own, other = segments[:, None, :, None], segments[:, None, None, :]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()  # (L, L)
    return causal & ((own == other) | (other == 0))  # (R, 1, L, L)
