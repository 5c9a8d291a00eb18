"""Keyframe selection (DKS): the few frames of a long clip that a question is about.

ViLAMP (arXiv 2504.02438) section 4.1 and algorithm 1: frames are visited from the most to the
least relevant, and one that looks like a keyframe already chosen is passed over. The embeddings of
frames and question come from one CLIP or SigLIP, so that their cosines mean something; nothing here
is learnt. The baselines, evenly spaced and most relevant frames, are here too. Keyframes are frame
numbers in order of time: (K,) int64, on the CPU. T frames (the paper's N), D the width of the
embeddings. Taught in notebook 06.
"""

from bisect import bisect_left
from itertools import pairwise

import torch
import torch.nn.functional as F

from tlv.checks import check_shape
from tlv.video import sample_indices

BLOCK = 2048  # candidates compared at once: (2048, K) cosines, whatever T is
FILLS = ("gaps", "none")


def select_keyframes(frames, query, num_keyframes=32, threshold=0.85, min_relevance=None,
                     fill="gaps") -> torch.Tensor:
    """Differential keyframe selection: relevant to the question, unlike each other.

    frames (T, D) and query (D,), embeddings of any length and float type -> (K,) int64, ascending.
    A frame is passed over if its cosine with a chosen keyframe exceeds `threshold`; none with a
    relevance below `min_relevance` is chosen. With fill = "gaps" the rest of the budget goes to the
    gaps (`fill_gaps`), so that K = min(T, num_keyframes); with "none" there may be fewer, even none
    where `min_relevance` is set. The work is O(T K D). Raises ValueError for embeddings that are
    missing, do not fit or are not finite, and for options out of range.
    Source: ViLAMP equations 1 to 4, algorithm 1; filling and `min_relevance` are of its code.
    Taught in notebook 06.
    """
    _check_budget(num_keyframes)
    _check_cosine("threshold", threshold)
    if min_relevance is not None:
        _check_cosine("min_relevance", min_relevance)
    if fill not in FILLS:
        raise ValueError(f"fill = {fill!r}: must be one of {', '.join(FILLS)}")
    frames, query = _unit_vectors(frames, query)
    relevance = _relevance(frames, query)  # (T,)
    order = _by_relevance(relevance)
    if min_relevance is not None:
        order = order[relevance[order] >= min_relevance]  # (candidates,)
    keyframes = _sorted(_pick(frames, order, num_keyframes, threshold))
    # filled by default, as in the published code: equally many keyframes, whatever the question
    return fill_gaps(keyframes, len(frames), num_keyframes) if fill == "gaps" else keyframes


def _pick(frames, order, num_keyframes, threshold) -> list[int]:
    """Walk down `order`; a block of candidates is compared with all earlier picks at once."""
    picks = []
    for block in order.split(BLOCK):
        rows = frames[block]  # (b, D)
        is_free = (_cosines(rows, frames[picks]) <= threshold).all(1)  # (b,)
        while is_free.any() and len(picks) < num_keyframes:
            first = is_free.int().argmax()  # the most relevant of those left
            picks.append(block[first].item())
            # equality passes, as in the published code (the paper refuses it)
            is_free &= (_cosines(rows, rows[first : first + 1]) <= threshold)[:, 0]  # (b,)
            is_free[first] = False
        if len(picks) == num_keyframes:
            break
    return picks


def _cosines(a, b):
    # rounding can lift the cosine of equal frames above 1, and a threshold of 1 refuses nothing
    return (a @ b.T).clamp(max=1)


def fill_gaps(keyframes, num_frames, num_keyframes) -> torch.Tensor:
    """Add frames between the keyframes (ascending) until there are min(T, num_keyframes).

    A gap is a run of frames that are not keyframes. With the smallest spacing for which the budget
    suffices, a gap of n frames gets ceil(n / spacing) - 1 of them, evenly; what is left over goes
    to the last frames of the clip. Raises ValueError for keyframes that are out of order or more
    than `num_keyframes`. Source: ViLAMP's published code; the paper does not fill.
    Taught in notebook 06.
    """
    _check_budget(num_keyframes)
    chosen = set(check_keyframes(keyframes, num_frames))
    if len(chosen) > num_keyframes:
        raise ValueError(f"{len(chosen)} keyframes are more than num_keyframes = {num_keyframes}")
    budget = min(num_frames, num_keyframes) - len(chosen)
    borders = [-1, *sorted(chosen), num_frames]
    gaps = [(left + 1, right - left - 1) for left, right in pairwise(borders)]  # (start, length)

    def is_enough(spacing):
        return sum(_num_inside(length, spacing) for _, length in gaps) <= budget

    spacing = 1 + bisect_left(range(1, num_frames + 1), True, key=is_enough)
    for start, length in gaps:
        count = _num_inside(length, spacing)
        # never past the gap: the step is at most the spacing, and count * spacing < length
        step = -(-length // (count + 1))
        chosen.update(start + step * i for i in range(1, count + 1))
    rest = [frame for frame in range(num_frames) if frame not in chosen]
    missing = min(num_frames, num_keyframes) - len(chosen)
    return _sorted([*chosen, *rest[len(rest) - missing :]])


def _num_inside(length, spacing) -> int:
    """Frames that a gap gets: none for an empty one."""
    return max(0, -(-length // spacing) - 1)


def uniform_keyframes(num_frames, num_keyframes) -> torch.Tensor:
    """The baseline that does not look: evenly spaced, first and last frame included.

    -> (min(T, num_keyframes),) int64. A run of L frames is hit with a chance of about
    L (K - 1) / (T - 1). Raises ValueError for no frames or no keyframes. Taught in notebook 06.
    """
    _check_clip(num_frames)
    _check_budget(num_keyframes)
    return torch.from_numpy(sample_indices(num_frames, min(num_frames, num_keyframes)))


def top_k_keyframes(frames, query, num_keyframes) -> torch.Tensor:
    """The baseline that does not compare: the frames most relevant to the question.

    frames (T, D), query (D,) -> (min(T, num_keyframes),) int64, ascending. Raises ValueError as
    `select_keyframes` does. Source: "query-guided" in ViLAMP table 2. Taught in notebook 06.
    """
    _check_budget(num_keyframes)
    return _sorted(_by_relevance(frame_relevance(frames, query))[:num_keyframes])


def choose_keyframes(selection, frames, query, num_keyframes, threshold) -> torch.Tensor:
    """Keyframes by one of SELECTIONS: frames (T, D), query (D,) -> (min(T, num_keyframes),) int64.

    The number is the same for all, so that they can be compared. Raises ValueError for an unknown
    name, and as the function named does. Taught in notebook 06.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection {selection!r} is unknown; known are {', '.join(SELECTIONS)}")
    return SELECTIONS[selection](frames, query, num_keyframes, threshold)


SELECTIONS = {
    "dks": select_keyframes,
    "top_k": lambda frames, query, count, threshold: top_k_keyframes(frames, query, count),
    "uniform": lambda frames, query, count, threshold: uniform_keyframes(len(frames), count),
}


def count_clip_tokens(num_frames, num_keyframes, per_keyframe, per_frame=1) -> int:
    """Tokens of a clip, S = K P + (T - K): of its keyframes, and of all other frames.

    A clip shorter than `num_keyframes` is all keyframes. Source: ViLAMP section 4.3. Taught in
    notebook 06.
    """
    num_keys = min(num_frames, num_keyframes)
    return num_keys * per_keyframe + (num_frames - num_keys) * per_frame


def frame_relevance(frames, query) -> torch.Tensor:
    """Cosine of every frame with the question: frames (T, D), query (D,) -> (T,) float32.

    Raises ValueError for embeddings that are missing, do not fit or are not finite.
    Source: ViLAMP equation 2. Taught in notebook 06.
    """
    frames, query = _unit_vectors(frames, query)
    return _relevance(frames, query)  # (T,)


def preceding_keyframes(keyframes, num_frames) -> torch.Tensor:
    """For every frame the nearest keyframe at or before it, -1 where there is none -> (T,) int64.

    Raises ValueError for keyframes that are out of order or beyond the clip.
    Source: ViLAMP section 4.2 (the published code takes other frames). Taught in notebook 06.
    """
    keyframes = torch.tensor([-1, *check_keyframes(keyframes, num_frames)])
    return keyframes[torch.searchsorted(keyframes, torch.arange(num_frames), right=True) - 1]


def check_keyframes(keyframes, num_frames) -> list[int]:
    """The keyframes as a list, or ValueError: ascending frame numbers, maybe none, of T frames.

    Taught in notebook 06.
    """
    _check_clip(num_frames)
    numbers = torch.as_tensor(keyframes, dtype=torch.int64).tolist()
    if any(left >= right for left, right in pairwise(numbers)):
        raise ValueError(f"keyframes {numbers} must be ascending, each one once")
    for number in numbers:
        if not 0 <= number < num_frames:
            raise ValueError(f"keyframe {number}: the clip's frames are 0 to {num_frames - 1}")
    return numbers


# ---- what the functions share ---------------------------------------------------------------


def _check_clip(num_frames):
    if num_frames < 1:
        raise ValueError(f"a clip of {num_frames} frames: there must be at least 1")


def _check_budget(num_keyframes):
    if num_keyframes < 1:
        raise ValueError(f"num_keyframes = {num_keyframes}: must be at least 1")


def _check_cosine(name, value):
    if not -1 <= value <= 1:
        raise ValueError(f"{name} = {value}: a cosine is from -1 to 1")


def _relevance(frames, query):
    # every frame summed by itself: in a product with the matrix a last bit depends on the row, so
    # that of two equal frames the later one could win; in blocks, for a copy of each is made
    return torch.cat([torch.linalg.vecdot(rows, query) for rows in frames.split(BLOCK)])  # (T,)


def _by_relevance(relevance):
    """Frame numbers, the most relevant first; of equals the earlier one."""
    return relevance.argsort(descending=True, stable=True)


def _sorted(frames):
    return torch.as_tensor(frames, dtype=torch.int64).cpu().sort().values


def _unit_vectors(frames, query):
    """Both in fp32 and of length 1, or ValueError."""
    check_shape(frames, (None, None), "frames")
    _check_clip(len(frames))
    check_shape(query, (frames.shape[1],), "query (as wide as a frame)")
    return _unit(frames, "frames"), _unit(query[None], "query")[0]


def _unit(x, name):
    x = x.float()
    norms = x.norm(dim=1)  # (rows,)
    if not norms.isfinite().all():
        row = norms.isfinite().int().argmin()  # the first one
        raise ValueError(f"{name}: embedding {row} of {len(x)} has the norm {norms[row]:g}; "
                         "all must be finite")
    return F.normalize(x, dim=1)
