"""Feature merging (DFM): every frame that is not a keyframe becomes one token.

ViLAMP (arXiv 2504.02438) section 4.2: the token is a weighted mean of the frame's patches, and a
patch weighs more the nearer it is to the question and the less it repeats the same place of the
nearest preceding keyframe. Merging happens in the vision encoder's width, before the connector's
matrices. Every form is called as merge(frames (n, N, D_v), key, query (D_q,)) -> (n, D_v): key is
the reference frame's patches, (N, D_v) for all n frames or (n, N, D_v) for each its own, or None
where no keyframe precedes. n frames, N patches per frame. Taught in notebook 06.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tlv.checks import check_shape
from tlv.keyframes import check_keyframes, preceding_keyframes


class PaperMerging(nn.Module):
    """Weights from cosines of the patches as they are; nothing is learnt.

    The query must live in the patches' space (D_q = D_v). `redundancy_weight` is the paper's
    lambda, `temperature` its alpha: a small one picks a patch, a large one takes the mean. Raises
    ValueError for a temperature <= 0. Source: ViLAMP section 4.2. Taught in notebook 06.
    """

    def __init__(self, redundancy_weight=1.0, temperature=0.01):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature}: must be > 0 (the paper's is 0.01)")
        # numbers, not parameters: the paper fixes both; as a buffer bf16 would round 0.01
        self.redundancy_weight, self.temperature = redundancy_weight, temperature

    def relevance(self, frames, query):
        """R_p, cosine of each patch with the question: (n, N, D_v), (D_q,) -> (n, N) float32.

        Taught in notebook 06.
        """
        check_shape(query, (frames.shape[2],), "query (as wide as a patch)")
        return _cosine(frames, query)

    def redundancy(self, frames, key):
        """T_p, cosine of each patch with its place in `key`: (n, N, D_v) -> (n, N) float32.

        Taught in notebook 06.
        """
        return _cosine(frames, key)

    def weights(self, frames, key, query):
        """softmax((R_p - lambda T_p) / alpha), each patch's share: (n, N) float32, sum 1.

        frames (n, N, D_v), key (N, D_v) or (n, N, D_v) or None, query (D_q,). Raises ValueError for
        shapes that do not fit. Source: ViLAMP section 4.2. Taught in notebook 06.
        """
        check_shape(frames, (None, None, None), "frames")
        score = self.relevance(frames, query)
        if key is not None:  # without a keyframe nothing is redundant: T_p = 0, as in the paper
            wanted = frames.shape if key.ndim == 3 else frames.shape[1:]
            check_shape(key, wanted, "key (patches as in frames)")
            score = score - self.redundancy_weight * self.redundancy(frames, key)
        return (score / self.temperature).softmax(-1)

    def forward(self, frames, key, query):
        weights = self.weights(frames, key, query)
        return (weights[:, None] @ frames.float())[:, 0].to(frames.dtype)  # (n, D_v)


class LearnedMerging(PaperMerging):
    """Cosines after learnt matrices, for encoders whose patches and texts share no space.

    `width` is that of the space where they meet. Frames of any float type; vision_width = D_v,
    query_width = D_q. Four small matrices before the connector, where the published code has four
    of the LLM's width behind it. Source: ViLAMP's code, module SigPooling. Taught in notebook 06.
    """

    def __init__(self, vision_width, query_width, width=256, redundancy_weight=1.0,
                 temperature=0.01):
        super().__init__(redundancy_weight, temperature)
        self.relevant_patch = _Float32Linear(vision_width, width)
        self.relevant_query = _Float32Linear(query_width, width)
        self.redundant_patch = _Float32Linear(vision_width, width)
        self.redundant_key = _Float32Linear(vision_width, width)

    def relevance(self, frames, query):
        check_shape(query, (self.relevant_query.in_features,), "query (query_width)")
        return _cosine(self.relevant_patch(frames), self.relevant_query(query))

    def redundancy(self, frames, key):
        return _cosine(self.redundant_patch(frames), self.redundant_key(key))


class _Float32Linear(nn.Linear):
    """A matrix that computes in fp32 whatever it is stored in: its cosines are divided by 0.01."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)  # as in the published code
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class MeanMerging(nn.Module):
    """The baseline that does not look: all patches count the same. Taught in notebook 06."""

    def forward(self, frames, key, query):
        return frames.mean(1)  # (n, D_v)


class DropMerging(nn.Module):
    """The baseline of keyframes alone: no token for any other frame. Taught in notebook 06."""

    def forward(self, frames, key, query):
        return frames.new_zeros(0, frames.shape[-1])  # (0, D_v)


MERGINGS = {
    "learned": lambda vision_width, query_width, width: LearnedMerging(
        vision_width, query_width, width
    ),
    "paper": lambda vision_width, query_width, width: PaperMerging(),
    "mean": lambda vision_width, query_width, width: MeanMerging(),
    "drop": lambda vision_width, query_width, width: DropMerging(),
}


def build_merging(name, vision_width, query_width, width=256) -> nn.Module:
    """One of MERGINGS; `width` is that of the learned one's space.

    Raises ValueError for an unknown name, and for `paper` where patch and query differ in width:
    their cosines would mean nothing. Taught in notebook 06.
    """
    if name not in MERGINGS:
        raise ValueError(f"merging {name!r} is unknown; known are {', '.join(MERGINGS)}")
    if name == "paper" and vision_width != query_width:
        raise ValueError(f"merging 'paper' compares patches with the query as they are, but they "
                         f"are {vision_width} and {query_width} wide; take 'learned'")
    return MERGINGS[name](vision_width, query_width, width)


def _cosine(a, b):
    """Cosine over the last axis in fp32: bf16 scores, divided by 0.01, would be off by half."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def merge_frames(merge, frames, keyframes, query) -> torch.Tensor:
    """Dense: all frames of a clip at once, for clips that fit in memory.

    merge: one of the forms above; frames (T, N, D_v); keyframes ascending frame numbers (K,), maybe
    none; query (D_q,) -> (T - K, D_v) tokens in order of time, (0, D_v) when they are dropped.
    Raises ValueError for no frames, keyframes that do not fit, shapes that do not fit.
    Source: ViLAMP sections 4.2 and 4.3. Taught in notebook 06.
    """
    check_shape(frames, (None, None, None), "frames")
    reference = preceding_keyframes(keyframes, len(frames))  # (T,)
    early = reference < 0  # nothing precedes these, and they come first
    late = ~early & (reference != torch.arange(len(frames)))
    tokens = merge(frames[late], frames[reference[late]], query)
    return torch.cat([merge(frames[early], None, query), tokens])  # (T - K, D_v)


class MergeStream:
    """Streaming: the same tokens from frames that come in chunks; one keyframe is kept meanwhile.

    The arguments are those of `merge_frames`. `feed` chunks in order of time, then `close`.
    Taught in notebook 06.
    """

    def __init__(self, merge, keyframes, query):
        self.merge, self.query = merge, query
        self.keyframes = check_keyframes(keyframes, float("inf"))  # `close` knows the length
        self.key, self.start = None, 0  # the keyframe that precedes, the next chunk's first frame

    def feed(self, chunk):
        """Frames (B, N, D_v), any B -> yields (is_keyframe, rows), in order.

        For a keyframe the rows are its patches (N, D_v), for a run of other frames their tokens
        (n, D_v). Raises ValueError for shapes that do not fit.
        """
        check_shape(chunk, (None, None, None), "chunk of frames")
        stop, begin = self.start + len(chunk), 0
        inside = [k - self.start for k in self.keyframes if self.start <= k < stop]
        for place in [*inside, len(chunk)]:
            if begin < place:
                yield False, self.merge(chunk[begin:place], self.key, self.query)
            if place < len(chunk):
                self.key = chunk[place].clone()  # (N, D_v); a view would keep the chunk alive
                yield True, self.key
            begin = place + 1
        self.start = stop

    def close(self):
        """ValueError if a keyframe lies beyond the clip's end, or there were no frames."""
        check_keyframes(self.keyframes, self.start)
