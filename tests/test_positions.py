"""Random gaps between video tokens: order and distances within text stay, the range is used."""

import numpy as np
import pytest

from tlv.isolation import isolate, pad_rows
from tlv.positions import MAX_GAPS, spread

VIDEO = 7


def make_row(before, num_video, after):
    ids = [1] * before + [VIDEO] * num_video + [2] * after
    return {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + [2]}


def spread_row(row, num_positions, seed=0):
    is_video = [token == VIDEO for token in row["input_ids"]]
    return spread(row, is_video, num_positions, np.random.default_rng(seed))


def test_text_keeps_its_distances_and_video_tokens_their_order():
    for seed in range(50):
        positions = np.array(spread_row(make_row(3, 40, 6), 10_000, seed)["positions"])
        steps = np.diff(positions)
        assert (steps >= 1).all() and positions[-1] < 10_000
        assert positions[:3].tolist() == [0, 1, 2] and (steps[-5:] == 1).all()
        assert 0 < (steps > 1).sum() <= MAX_GAPS


def test_last_positions_fill_the_context_evenly():
    last = [spread_row(make_row(2, 30, 4), 5_000, seed)["positions"][-1] for seed in range(600)]
    shares = np.histogram(last, bins=5, range=(0, 5_000))[0] / 600
    assert (abs(shares - 0.2) < 0.06).all()
    assert min(last) >= 35 and max(last) > 4_900


def test_a_row_that_fills_the_context_has_no_gap():
    assert spread_row(make_row(1, 5, 4), 10)["positions"] == list(range(10))
    assert spread_row(make_row(4, 0, 2), 10)["positions"] == list(range(6))
    with pytest.raises(ValueError, match="10 positions does not fit into the LLM's 9"):
        spread_row(make_row(1, 5, 4), 9)


def test_isolated_turns_shift_alike():
    rows = [make_row(1, 6, 3), make_row(1, 6, 5)]
    rows[1]["input_ids"][-1] = 3  # so that the turns differ
    row = spread_row(isolate(rows), 500)
    segments, positions = np.array(row["segments"]), np.array(row["positions"])
    first, second = positions[segments == 1], positions[segments == 2]
    assert first[0] == second[0] == positions[segments == 0][-1] + 1
    assert (np.diff(first) == 1).all() and (np.diff(second) == 1).all()


def test_a_plain_row_gets_the_mask_that_it_had_without_gaps():
    row, other = spread_row(make_row(1, 3, 2), 100), make_row(1, 1, 2)
    batch = pad_rows([row, spread_row(other, 100)], pad_id=0)
    assert batch["attention_mask"].shape == (2, 1, 6, 6)
    assert batch["attention_mask"][0, 0].equal(batch["attention_mask"][0, 0].tril())
    assert batch["attention_mask"][0, 0].sum() == 21  # causal, nothing hidden
    assert not batch["attention_mask"][1, 0, :4, 4:].any()  # nobody looks at padding
    assert batch["position_ids"][0].tolist() == row["positions"]
