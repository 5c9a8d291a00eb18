"""The order in which samples are trained on: pure functions of the seed, equal for any number of
ranks, so that nothing of it has to be saved. Taught in notebook 04.
"""

import numpy as np


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of range(num_samples) in which `epoch` (from 0) visits the samples."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def sample_stream(num_samples: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Sample numbers at the places start..stop of the endless stream of epochs, one by one."""
    epochs = range(start // num_samples, (stop - 1) // num_samples + 1)
    if not epochs:
        return np.zeros(0, dtype=int)
    order = np.concatenate([epoch_order(num_samples, seed, e) for e in epochs])
    offset = epochs[0] * num_samples
    return order[start - offset : stop - offset]


def rank_batches(stream, micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """This rank's micro-batches: the stream in slices, dealt to the ranks in turn.

    So one rank with two accumulation steps and two ranks with one see the same micro-batches.
    A stream that does not divide leaves short (or empty) micro-batches at the end, and every
    rank has equally many.
    """
    per_round = micro_batch_size * world_size
    first = rank * micro_batch_size
    starts = range(first, first + -(-len(stream) // per_round) * per_round, per_round)
    return [[int(i) for i in stream[s : s + micro_batch_size]] for s in starts]


NUM_ALIKE = 32  # global batches among which samples of like length find each other


def group_alike(stream, keys, global_batch_size: int, seed: int) -> np.ndarray:
    """A stream rearranged so that a global batch holds one modality and like lengths.

    So there is less padding, and no rank waits for one with longer rows. keys[i] is (modality,
    length) of sample i. Samples move within NUM_ALIKE global batches only, so every epoch still
    visits each once; a batch on the border of two modalities holds both.
    Source: LLaVA's grouping by modality and length, which fails where there is one modality.
    """
    groups, size, span = [], global_batch_size, NUM_ALIKE * global_batch_size
    for start in range(0, len(stream), span):
        alike = sorted(stream[start : start + span], key=lambda index: keys[index])
        batches = [alike[k : k + size] for k in range(0, len(alike), size)]
        is_short = len(batches[-1]) < size
        moved = np.random.default_rng([seed, start]).permutation(len(batches) - is_short)
        groups += [batches[k] for k in moved] + batches[len(moved) :]
    return np.array([index for group in groups for index in group], dtype=int)


def sample_key(sample) -> tuple[int, int]:
    """(modality, number of words) of a LLaVA sample: 0 text alone, 1 picture, 2 video."""
    if not isinstance(sample, dict):
        return 0, 0  # a bad sample; it is found out when it is read
    turns = sample.get("conversations")
    turns = turns if isinstance(turns, list) else []
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    num_words = sum(len(text.split()) for text in texts if isinstance(text, str))
    return 2 if sample.get("video") else 1 if sample.get("image") else 0, num_words
