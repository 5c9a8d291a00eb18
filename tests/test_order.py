"""The order of samples, and how it is dealt to ranks."""

import numpy as np
import pytest

from tlv.order import epoch_order, group_alike, rank_batches, sample_key, sample_stream


def test_an_epoch_visits_everything_in_an_order_of_its_own():
    first, second = epoch_order(50, 3, 0), epoch_order(50, 3, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second) != list(epoch_order(50, 4, 1))
    assert list(first) == list(epoch_order(50, 3, 0))


def test_the_stream_is_the_epochs_one_after_the_other():
    stream = sample_stream(7, 1, 0, 21)
    assert list(stream) == [i for e in range(3) for i in epoch_order(7, 1, e)]
    assert list(sample_stream(7, 1, 5, 16)) == list(stream[5:16])
    assert len(sample_stream(7, 1, 0, 0)) == 0


def test_ranks_and_accumulation_share_the_same_global_batches():
    stream = sample_stream(40, 0, 0, 24)
    one = rank_batches(stream, 2, 0, 1)  # 12 micro-batches
    for world_size in (2, 4):
        ranks = [rank_batches(stream, 2, r, world_size) for r in range(world_size)]
        assert [b for together in zip(*ranks, strict=True) for b in together] == one


def test_every_rank_gets_equally_many_micro_batches_even_if_some_are_empty():
    ranks = [rank_batches(range(5), 2, r, 4) for r in range(4)]
    assert ranks == [[[0, 1]], [[2, 3]], [[4]], [[]]]


@pytest.mark.parametrize("num_modalities", [1, 3])
def test_grouping_keeps_the_samples_of_every_epoch_and_sorts_out_modalities(num_modalities):
    rng = np.random.default_rng(0)
    keys = [(int(i) % num_modalities, int(n)) for i, n in enumerate(rng.integers(10, 90, 150))]
    stream = sample_stream(150, 7, 0, 150 * 3 + 5)
    grouped = group_alike(stream, keys, 4, 7)
    assert sorted(grouped) == sorted(stream) and list(grouped) != list(stream)
    assert list(grouped) == list(group_alike(stream, keys, 4, 7))
    batches = rank_batches(grouped, 4, 0, 1)
    assert sum(len({keys[i][0] for i in b}) > 1 for b in batches) <= 2 * 4  # at borders only
    spread = [np.ptp([keys[i][1] for i in b]) for b in batches]
    plain = [np.ptp([keys[i][1] for i in b]) for b in rank_batches(stream, 4, 0, 1)]
    assert np.mean(spread) < np.mean(plain) / 4
    lengths = [np.mean([keys[i][1] for i in b]) for b in batches]
    assert lengths != sorted(lengths)  # the groups themselves come in random order


def test_a_sample_is_told_by_its_visual_and_its_words():
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A red ring."}]
    assert sample_key({"conversations": turns}) == (0, 6)
    assert sample_key({"image": "a.png", "conversations": turns}) == (1, 6)
    assert sample_key({"video": "a.mp4", "conversations": turns}) == (2, 6)
    assert sample_key({"video": None, "image": "a.png", "conversations": turns}) == (1, 6)
    for broken in ("broken", {"conversations": None}, {"conversations": 7}):
        assert sample_key(broken) == (0, 0)
