"""Feature merging against golden values and plain loops; streaming against dense."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F

from tlv.keyframes import preceding_keyframes
from tlv.merging import (
    DropMerging,
    LearnedMerging,
    MeanMerging,
    MergeStream,
    PaperMerging,
    merge_frames,
)


def merge_stream(merge, chunks, keyframes, query):
    """Feed all chunks, one alive at a time."""
    stream, chunks = MergeStream(merge, keyframes, query), iter(chunks)
    while (chunk := next(chunks, None)) is not None:
        yield from stream.feed(chunk)
        del chunk
    stream.close()



def det(rows, width, a=1.0, b=0.0):
    """The deterministic features behind the golden values."""
    i, j = torch.arange(rows).double()[:, None], torch.arange(width).double()
    return torch.sin(a * (i + 1) * (j + 1) * 0.37 + b + 0.11 * j**2).float()


FRAMES = det(24, 8, a=0.33).reshape(4, 6, 8)
KEY, QUERY = det(6, 8, a=0.21, b=0.5), det(1, 8, a=0.4, b=0.2)[0]


# ---- golden values --------------------------------------------------------------------------

GOLDEN = {  # (key?, lambda, alpha): patches with the largest weight, these weights, sum of output
    (True, 1, 0.01): ([0, 3, 3, 4], [0.890303, 0.677992, 0.995986, 1.0], 3.640254),
    (True, 1, 0.1): ([0, 3, 3, 4], [0.532072, 0.340155, 0.427014, 0.905696], 3.691554),
    (True, 0, 0.1): ([1, 2, 2, 3], [0.506758, 0.490479, 0.376647, 0.558377], 4.356411),
    (True, 1, 1): ([0, 3, 3, 4], [0.245080, 0.188203, 0.193655, 0.237375], 3.398148),
    (False, 1, 0.1): ([1, 2, 2, 3], [0.506758, 0.490479, 0.376647, 0.558377], 4.356411),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_paper_form(case):
    (has_key, redundancy_weight, temperature), (places, largest, total) = case, GOLDEN[case]
    merge, key = PaperMerging(redundancy_weight, temperature), KEY if has_key else None
    top = merge.weights(FRAMES, key, QUERY).max(1)
    assert top.indices.tolist() == places
    assert top.values.tolist() == pytest.approx(largest, abs=1e-5)
    assert merge(FRAMES, key, QUERY).sum().item() == pytest.approx(total, abs=1e-5)


def test_golden_by_hand():
    frames, query = torch.eye(2)[None], torch.tensor([1.0, 0.0])
    merge = PaperMerging(temperature=1.0)
    weights = merge.weights(frames, None, query)[0]
    assert weights.tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)
    key = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert merge.weights(frames, key, query)[0].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


@torch.no_grad()
def test_golden_learned_form():
    merge = LearnedMerging(vision_width=8, query_width=6, width=8)
    for layer, a in ((merge.relevant_patch, 0.7), (merge.redundant_patch, 0.9),
                     (merge.relevant_query, 1.1), (merge.redundant_key, 1.3)):  # fmt: skip
        layer.weight.copy_(0.2 * det(*layer.weight.shape, a))
    frames, keys = (det(45, 8, a, b).reshape(5, 9, 8) for a, b in ((0.33, 0), (0.21, 0.5)))
    tokens = merge(frames, keys, det(1, 6, a=0.4, b=0.2)[0])  # every frame has a key of its own
    wanted = torch.tensor([
        [0.121797, 0.346840, 0.721731, 0.995735, 0.696919, -0.334437, -0.994771, 0.083517],
        [0.943653, 0.393537, -0.755409, -0.209671, 0.714819, -0.392626, -0.168140, 0.571148],
    ])  # fmt: skip
    assert torch.allclose(tokens[:2], wanted, atol=1e-5)
    assert tokens.sum().item() == pytest.approx(-0.415985, abs=1e-5)


# ---- plain loops ----------------------------------------------------------------------------


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def merge_by_loops(frame, key, query, redundancy_weight, temperature):
    """Section 4.2 for one frame: lists of patches -> one token."""
    scores = [cosine(patch, query) for patch in frame]
    if key is not None:
        scores = [s - redundancy_weight * cosine(patch, same)
                  for s, patch, same in zip(scores, frame, key, strict=True)]  # fmt: skip
    terms = [math.exp(s / temperature) for s in scores]
    return [
        sum(term * patch[d] for term, patch in zip(terms, frame, strict=True)) / sum(terms)
        for d in range(len(query))
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("redundancy_weight, temperature", [(1, 0.01), (0.5, 0.3)])
def test_clip_equals_plain_loops(seed, redundancy_weight, temperature):
    generator = torch.Generator().manual_seed(seed)
    frames, query = torch.randn(9, 5, 7, generator=generator), torch.randn(7, generator=generator)
    keyframes = torch.randperm(9, generator=generator)[:3].sort().values.tolist()
    wanted, key = [], None
    for number, frame in enumerate(frames.tolist()):
        if number in keyframes:
            key = frame
        else:
            wanted.append(
                merge_by_loops(frame, key, query.tolist(), redundancy_weight, temperature)
            )
    tokens = merge_frames(PaperMerging(redundancy_weight, temperature), frames, keyframes, query)
    assert torch.allclose(tokens, torch.tensor(wanted), atol=2e-5)


@torch.no_grad()
def test_learned_form_is_the_paper_form_in_learnt_spaces():
    torch.manual_seed(0)
    merge, query = LearnedMerging(8, 5, width=4, temperature=0.1), torch.randn(5)
    for bias in (layer.bias for layer in merge.children()):
        bias.normal_(std=0.02)
    R = F.cosine_similarity(merge.relevant_patch(FRAMES), merge.relevant_query(query), dim=-1)
    T = F.cosine_similarity(merge.redundant_patch(FRAMES), merge.redundant_key(KEY), dim=-1)
    for key, score in ((KEY, R - T), (None, R)):
        wanted = torch.einsum("nm,nmd->nd", (score / 0.1).softmax(1), FRAMES)
        assert torch.allclose(merge(FRAMES, key, query), wanted, atol=1e-5)


# ---- what must hold -------------------------------------------------------------------------


def test_identities_of_the_paper_form():
    merge = PaperMerging(temperature=0.1)
    tokens, weights = merge(FRAMES, KEY, QUERY), merge.weights(FRAMES, KEY, QUERY)
    assert torch.allclose(weights.sum(1), torch.ones(4))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(merge(FRAMES[:, order], KEY[order], QUERY), tokens, atol=1e-6)
    assert not torch.allclose(merge(FRAMES, KEY[order], QUERY), tokens, atol=1e-2)
    assert torch.allclose(merge(FRAMES, 3 * KEY, 0.2 * QUERY), tokens, atol=1e-5)
    assert torch.allclose(
        merge.weights(FRAMES, FRAMES, QUERY), merge.weights(FRAMES, None, QUERY), atol=1e-6
    )
    assert torch.allclose(merge(FRAMES, KEY.expand(4, -1, -1), QUERY), tokens, atol=1e-6)


def test_hot_merging_is_the_mean_and_cold_merging_picks():
    mean = MeanMerging()(FRAMES, KEY, QUERY)
    assert torch.allclose(mean, FRAMES.mean(1), atol=1e-6)
    assert torch.allclose(PaperMerging(temperature=1e6)(FRAMES, KEY, QUERY), mean, atol=1e-5)
    merge = PaperMerging(temperature=1e-5)
    places = merge.weights(FRAMES, KEY, QUERY).argmax(1)
    assert torch.allclose(merge(FRAMES, KEY, QUERY), FRAMES[range(4), places], atol=1e-5)


def test_the_colder_the_more_the_needle_weighs():
    """One patch of 729 that fits the query: its mean weight over 20 draws, by temperature."""
    weights = {temperature: [] for temperature in (1.0, 0.1, 0.01, 0.001)}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        key, other = torch.randn(2, 729, 64, generator=generator)
        query = torch.randn(64, generator=generator)
        frame = other.clone()
        frame[300] = query + 0.5 * torch.randn(64, generator=generator)
        for temperature, found in weights.items():
            merge = PaperMerging(temperature=temperature)
            found.append(merge.weights(frame[None], key, query)[0, 300].item())
    means = [sum(found) / 20 for found in weights.values()]
    assert means[0] == pytest.approx(0.003, abs=1e-3) and 0.3 < means[1] < 0.8
    assert means[2:] == pytest.approx([1.0, 1.0], abs=5e-3)


def test_a_patch_that_the_keyframe_shows_already_counts_less():
    generator = torch.Generator().manual_seed(0)
    frame, query = torch.randn(1, 50, 64, generator=generator), torch.randn(64, generator=generator)
    frame[0, 20] = query + 0.5 * torch.randn(64, generator=generator)
    fresh = torch.randn(50, 64, generator=generator)
    stale = fresh.clone()
    stale[20] = frame[0, 20]
    merge = PaperMerging(temperature=0.1)
    new, seen = (merge.weights(frame, key, query)[0, 20].item() for key in (fresh, stale))
    assert new > 0.8 and seen < 0.1


def test_scores_are_fp32_whatever_the_features_are():
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(32, generator=generator)  # patches that differ little: scores do too
    key = (alike + 0.1 * torch.randn(9, 32, generator=generator)).bfloat16()
    frames = (key + 0.1 * torch.randn(4, 9, 32, generator=generator)).bfloat16()
    query = torch.randn(32, generator=generator).bfloat16()
    merge = PaperMerging()
    weights = merge.weights(frames, key, query)
    wanted = merge.weights(frames.float(), key.float(), query.float())
    assert weights.dtype == torch.float32 and torch.equal(weights, wanted)
    tokens = merge(frames, key, query)
    assert torch.equal(tokens, merge(frames.float(), key.float(), query.float()).bfloat16())
    score = F.cosine_similarity(frames, query, dim=-1) - F.cosine_similarity(frames, key, dim=-1)
    assert ((score / 0.01).float().softmax(-1) - wanted).abs().max() > 0.05  # why it matters


def test_learned_scores_are_fp32_whatever_the_weights_are():
    torch.manual_seed(0)
    merge = LearnedMerging(8, 8, width=4).bfloat16()
    frames, key, query = FRAMES.bfloat16(), KEY.bfloat16(), QUERY.bfloat16()
    weights, tokens = merge.weights(frames, key, query), merge(frames, key, query)
    merge.float()
    assert torch.equal(weights, merge.weights(frames.float(), key.float(), query.float()))
    assert weights.dtype == torch.float32 and tokens.dtype == torch.bfloat16


def test_every_parameter_of_the_learned_form_learns():
    torch.manual_seed(0)
    merge = LearnedMerging(8, 5, width=4)
    merge_frames(merge, FRAMES, [1], torch.randn(5)).square().sum().backward()
    gradients = {name: p.grad is not None and p.grad.any() for name, p in merge.named_parameters()}
    assert len(gradients) == 8 and all(gradients.values())
    assert not list(PaperMerging().parameters())


def test_parameter_count_at_paper_size():
    with torch.device("meta"):
        merge = LearnedMerging(1152, 512)
    wanted = 3 * (1152 * 256 + 256) + 512 * 256 + 256
    assert sum(p.numel() for p in merge.parameters()) == wanted == 1_016_832


# ---- a clip ---------------------------------------------------------------------------------


def test_reference_is_the_preceding_keyframe_and_not_what_the_published_code_takes():
    generator = torch.Generator().manual_seed(0)
    frames, query = torch.randn(11, 6, 8, generator=generator), torch.randn(8, generator=generator)
    keyframes = [n for n, mark in enumerate("00100100010") if mark == "1"]
    reference = preceding_keyframes(keyframes, 11).tolist()
    assert reference == [-1, -1, 2, 2, 2, 5, 5, 5, 5, 9, 9]
    # the code counts keyframes and takes the frame of that number: the j-th segment, frame j
    published = [n if k < 0 else keyframes.index(k) for n, k in enumerate(reference)]
    assert published == [0, 1, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    merge, others = PaperMerging(), [0, 1, 3, 4, 6, 7, 8, 10]
    right, wrong = (
        torch.cat([
            merge(frames[n : n + 1], None if keys[n] < 0 else frames[keys[n]], query)
            for n in others
        ])
        for keys in (reference, published)
    )  # fmt: skip
    tokens = merge_frames(merge, frames, keyframes, query)
    assert torch.allclose(tokens, right, atol=1e-6)
    is_other = (tokens - wrong).abs().amax(1) > 0.01
    # before the first keyframe a frame is compared with itself: the same weights as with nothing
    assert is_other.tolist() == [False, False] + [True] * 6


MERGINGS = {
    "paper": PaperMerging,
    "learned": lambda: LearnedMerging(8, 8, width=4),
    "mean": MeanMerging,
    "drop": DropMerging,
}


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
@pytest.mark.parametrize("name", MERGINGS)
@torch.no_grad()
def test_streaming_equals_dense(name, chunk_size):
    torch.manual_seed(0)
    merge, frames, query = MERGINGS[name](), torch.randn(53, 9, 8), torch.randn(8)
    keyframes = [5, 6, 20, 52]  # with 7 in a chunk: the last of one, the first, the second last
    stream = list(merge_stream(merge, frames.split(chunk_size), torch.tensor(keyframes), query))
    tokens = torch.cat([rows for is_keyframe, rows in stream if not is_keyframe])
    # a product of another size may round in another order; a wrong keyframe is off by 0.1
    dense = merge_frames(merge, frames, keyframes, query)
    assert tokens.shape == dense.shape and torch.allclose(tokens, dense, rtol=0, atol=1e-5)
    patches = torch.stack([rows for is_keyframe, rows in stream if is_keyframe])
    assert torch.equal(patches, frames[keyframes])
    num_tokens = sum(len(rows) for _, rows in stream)
    assert num_tokens == (36 if name == "drop" else 85)  # 4 x 9, and 49 other frames


def test_stream_keeps_the_order_of_time():
    frames = torch.arange(5.0)[:, None, None].expand(5, 4, 3)
    stream = list(merge_stream(MeanMerging(), frames.split(3), [2], torch.ones(3)))
    shown = [(is_keyframe, rows[:, 0].tolist()) for is_keyframe, rows in stream]
    assert shown == [(False, [0, 1]), (True, [2] * 4), (False, [3, 4])]


@pytest.mark.parametrize("form", [PaperMerging, MeanMerging, DropMerging])
def test_stream_keeps_no_chunk_alive(form):
    num_dead = 0

    def chunks():
        nonlocal num_dead
        for _ in range(3):
            chunk = torch.randn(6, 4, 3)
            watch = weakref.ref(chunk)
            yield chunk
            del chunk
            num_dead += watch() is None

    stream = list(merge_stream(form(), chunks(), [3, 10, 17], torch.randn(3)))
    assert num_dead == 3
    assert {rows.untyped_storage().nbytes() for is_key, rows in stream if is_key} == {4 * 3 * 4}


@pytest.mark.parametrize("keyframes, num_tokens", [([], 4), ([0], 3), ([0, 1, 2, 3], 0)])
@pytest.mark.parametrize("form", [PaperMerging, lambda: LearnedMerging(8, 8)])
def test_no_keyframes_and_nothing_but_keyframes(form, keyframes, num_tokens):
    merge = form()
    tokens = merge_frames(merge, FRAMES, keyframes, QUERY)
    assert tokens.shape == (num_tokens, 8)
    if not keyframes:
        assert torch.equal(tokens, merge(FRAMES, None, QUERY))


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan")])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature = {temperature}: must be > 0"):
        PaperMerging(temperature=temperature)
    with pytest.raises(ValueError, match=f"temperature = {temperature}: must be > 0"):
        LearnedMerging(8, 8, temperature=temperature)


@pytest.mark.parametrize(
    "frames, key, query, words",
    [
        (FRAMES[0], KEY, QUERY, r"frames: shape \(6, 8\), wanted \(any, any, any\)"),
        (FRAMES, KEY[:5], QUERY, r"key \(patches as in frames\): shape \(5, 8\), wanted \(6, 8\)"),
        (FRAMES, KEY[0], QUERY, r"key .*: shape \(8,\), wanted \(6, 8\)"),
        (FRAMES, KEY[None], QUERY, r"key .*: shape \(1, 6, 8\), wanted \(4, 6, 8\)"),
        (FRAMES, KEY, QUERY[:7], r"query .*: shape \(7,\), wanted \(8\)"),
        (FRAMES, KEY, QUERY[None], r"query .*: shape \(1, 8\), wanted \(8\)"),
    ],
)
@pytest.mark.parametrize("form", [PaperMerging, lambda: LearnedMerging(8, 8)])
def test_shapes_that_do_not_fit_are_refused(form, frames, key, query, words):
    with pytest.raises(ValueError, match=words):
        form()(frames, key, query)


def dense(frames, keyframes):
    return merge_frames(PaperMerging(), frames, keyframes, QUERY)


def streamed(frames, keyframes):
    return list(merge_stream(PaperMerging(), frames.split(3), keyframes, QUERY))


@pytest.mark.parametrize("run", [dense, streamed])
def test_bad_clips_are_refused(run):
    for frames, keyframes, words in (
        (FRAMES[:0], [], "a clip of 0 frames: there must be at least 1"),
        (FRAMES[0], [], r"frames: shape \(\d, 8\), wanted \(any, any, any\)"),
        (FRAMES, [4], "keyframe 4: the clip's frames are 0 to 3"),
        (FRAMES, [-1], "keyframe -1: the clip's frames are 0 to"),
        (FRAMES, [2, 1], r"keyframes \[2, 1\] must be ascending"),
    ):
        with pytest.raises(ValueError, match=words):
            run(frames, keyframes)


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="a clip of 0 frames"):
        list(merge_stream(PaperMerging(), [], [], QUERY))
