"""Filters for raw video annotations: each judges one thing and returns (keep, reason).

A filter sees clips and annotations only, never the truth about planted defects. Every clip is
decoded once (`tlv.clip_facts`). The published pipeline (TinyLLaVA-Video, arXiv 2501.15513) does not
tell its filters; these are ours. They are put in a row by `tlv.funnel`. Taught in notebook 01.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from tlv.chat import odd_turns, parse_conversation
from tlv.clip_facts import GRID, ClipFacts
from tlv.templates import ConversationError

MAX_CHARACTERS = 16_384  # read at once, padding included: 150,000 logits for each token of them
KEPT = (True, "")
Verdict = tuple[bool, str]  # (keep, reason); the reason is empty where the sample is kept

# ---- filters of one clip --------------------------------------------------------------------


def is_readable(facts: ClipFacts) -> Verdict:
    """Keep a clip whose sampled frames all decode."""
    return (False, facts.error) if facts.error else KEPT


def of_clip(facts: dict[str, ClipFacts], judge: Callable) -> Callable[[dict], Verdict]:
    """A filter of clips as a filter of samples: each stands or falls with its clip."""

    def judge_sample(sample: dict) -> Verdict:
        name = sample.get("video")
        return judge(facts[name]) if name in facts else (False, f"'video' is {name!r}: no clip")

    return judge_sample


def unless_in(found: dict, key: str = "id") -> Callable[[dict], Verdict]:
    """Keep a sample whose `key` ("id" or "video") is not in `found`, which holds the reasons."""
    return lambda sample: (False, str(found[sample[key]])) if sample[key] in found else KEPT


def has_duration(facts: ClipFacts, min_seconds: float, max_seconds: float) -> Verdict:
    """Keep a clip that is neither too short to show a course of events nor too long to sample."""
    if min_seconds <= facts.duration <= max_seconds:
        return KEPT
    return False, f"lasts {facts.duration:.2f} s, not {min_seconds:g} to {max_seconds:g} s"


def motion_energy(facts: ClipFacts) -> float:
    """The largest change over time of any cell in any colour, 0..255.

    A maximum and not a mean: one small, slow object, or one change of colour, is motion enough,
    while the noise that a codec adds to a still picture stays small in every cell.
    """
    return float(np.ptp(facts.signature.astype(np.int16), axis=0).max())


def is_moving(facts: ClipFacts, min_motion: float) -> Verdict:
    """Keep a clip in which anything moves or changes."""
    energy = motion_energy(facts)
    return KEPT if energy >= min_motion else (False, f"still: motion {energy:.0f} < {min_motion:g}")


# ---- filters that compare clips -------------------------------------------------------------


def clip_distance(a: ClipFacts, b: ClipFacts) -> float:
    """How far two clips differ: the largest difference of any cell in any frame, 0..255.

    Encoding again moves every cell a little; another course of the same things moves a few cells
    by much. So the maximum tells them apart where a mean would not.
    """
    return float(np.abs(a.signature.astype(np.int16) - b.signature).max())


class Copy(NamedTuple):
    """Which clip is repeated, and `how`: "exact" or "encoded again"."""

    of: str
    how: str

    def __str__(self):
        return f"{self.how}: a copy of {self.of}"


def find_copies(clips: dict, references: dict, max_distance: float) -> dict[str, Copy]:
    """Clips that repeat a reference: {name: Copy}.

    Both arguments are {name: ClipFacts}. Where they are the same dict, a clip is compared with
    those before it in name order that are no copies themselves, so that the first one stays.
    Only clips whose durations agree to about 0.1 s are compared, which is far from all pairs.
    """
    exact: dict[str, str] = {}
    by_duration = defaultdict(list)  # tenths of a second -> numbers of references
    names, is_same = sorted(references), clips is references
    coarse = np.stack([_coarse(references[name]) for name in names]) if names else None  # (n, 48)

    def add(number):
        exact.setdefault(references[names[number]].digest, names[number])
        by_duration[round(references[names[number]].duration * 10)].append(number)

    if not is_same:
        for number in range(len(names)):
            add(number)
    found = {}
    for number, name in enumerate(sorted(clips)):
        facts = clips[name]
        if facts.digest in exact:
            found[name] = Copy(exact[facts.digest], "exact")
            continue
        tenth = round(facts.duration * 10)
        near = [other for t in (tenth - 1, tenth, tenth + 1) for other in by_duration[t]]
        # Means differ by no more than the cells do, so most references are told apart by those.
        gaps = np.abs(coarse[near] - _coarse(facts)).max(axis=1) if near else ()
        near = [names[o] for o, gap in zip(near, gaps, strict=True) if gap <= max_distance + 0.01]
        twin = next((o for o in near if clip_distance(facts, references[o]) <= max_distance), None)
        if twin:
            found[name] = Copy(twin, "encoded again")
        elif is_same:
            add(number)
    return found


def _coarse(facts: ClipFacts) -> np.ndarray:
    """Mean colours (48,) of 4 x 4 blocks of a signature, over all frames; of no clip: infinite."""
    if facts.signature is None:
        return np.full(48, np.inf, np.float32)
    blocks = facts.signature.reshape(-1, 4, GRID // 4, 4, GRID // 4, 3)  # (T, 4, 4, 4, 4, 3)
    return blocks.mean(axis=(0, 2, 4), dtype=np.float32).ravel()  # (48,)


# ---- filters of one annotation --------------------------------------------------------------


def caption_of(sample: dict) -> str:
    """The last answer of a sample, "" where its conversation cannot be read."""
    try:
        return parse_conversation(sample)[-1][1]
    except ConversationError:
        return ""


def repetition(text: str) -> float:
    """The share of word pairs that occurred before in the same text, 0..1: a loop comes near 1."""
    words = re.findall(r"\w+", text.lower())
    pairs = list(zip(words, words[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def is_good_caption(text: str, min_words: int, max_words: int, max_repetition: float) -> Verdict:
    """Keep a caption of a sensible length that does not run in a loop."""
    num_words = len(re.findall(r"\w+", text))
    if not min_words <= num_words <= max_words:
        return False, f"{num_words} words, not {min_words} to {max_words}: {text[:40]!r}"
    if (share := repetition(text)) > max_repetition:
        return False, f"a loop: {share:.0%} of its word pairs repeat: {text[:40]!r}"
    return KEPT


def is_well_formed(sample: dict) -> Verdict:
    """Keep a conversation that the chat templates can read whole: `tlv.chat.parse_conversation`."""
    try:
        parse_conversation(sample)
    except ConversationError as error:
        return False, str(error)
    odd = odd_turns(sample)
    return (False, "; ".join(odd)) if odd else KEPT


# ---- filters that ask a model ---------------------------------------------------------------


def find_outliers(values: dict, side: str, max_spread: float) -> dict[str, str]:
    """Entries far "above" or "below" the rest: {name: reason}.

    Far is more than `max_spread` interquartile ranges beyond the nearer quartile (Tukey's fences;
    1.5 is usual). A quarter of outliers does not move them, and a pool of two kinds, such as short
    and long captions, has fences that hold both: the pool sets its own scale, whatever the model.
    """
    if side not in ("above", "below"):
        raise ValueError(f"side = {side!r}: must be 'above' or 'below'")
    if not values:
        return {}
    low, high = np.quantile(list(values.values()), [0.25, 0.75])
    reach = max_spread * (high - low)
    limit = high + reach if side == "above" else low - reach
    far = {n: v for n, v in values.items() if (v > limit if side == "above" else v < limit)}
    return {name: f"{value:.2f} is {side} {limit:.2f}" for name, value in far.items()}


@torch.inference_mode()
def text_losses(texts: dict, llm, tokenizer, batch_size: int = 64) -> dict[str, float]:
    """Mean negative log-likelihood in nats per token of each text under a causal language model.

    Its exponential is the perplexity. texts: {name: text}; each is read from the end-of-text
    token on. Texts go in order of length, so that little is padding. Notebook 01.
    """
    names = sorted((n for n in texts if texts[n].strip()), key=lambda n: (len(texts[n]), n))
    losses = {}
    for chunk in _in_batches(names, texts, batch_size):
        rows = [tokenizer(tokenizer.eos_token + texts[n]).input_ids for n in chunk]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows]).to(llm.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        mask = mask.to(llm.device)  # (B, L)
        logits = llm(input_ids=ids, attention_mask=mask).logits[:, :-1].float()  # (B, L - 1, V)
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (B, L - 1)
        mean = (loss * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
        losses |= dict(zip(chunk, mean.tolist(), strict=True))
    return losses


def _in_batches(names, texts: dict, batch_size: int):
    """Names of texts, shortest first -> lists of some, whose logits fit into memory."""
    batch = []
    for name in names:
        is_full = len(batch) == batch_size or (len(batch) + 1) * len(texts[name]) > MAX_CHARACTERS
        if batch and is_full:
            yield batch
            batch = []
        batch.append(name)
    if batch:
        yield batch


def frame_embedder(model, image_processor, num_frames: int = 8) -> Callable:
    """The `embed` of `clip_facts.inspect_clips`: SigLIP on some frames -> unit vectors (T', D)."""

    @torch.inference_mode()
    def embed(frames: np.ndarray) -> torch.Tensor:
        some = frames[np.linspace(0, len(frames) - 1, num_frames, dtype=int)]
        pixels = image_processor(images=list(some), return_tensors="pt").pixel_values
        vectors = _vector(model.get_image_features(pixels.to(model.device)))  # (T', D)
        return F.normalize(vectors, dim=-1).cpu()  # those of all clips are kept

    return embed


@torch.inference_mode()
def text_agreement(clips: dict, captions: dict, model, tokenizer, batch_size: int = 256) -> dict:
    """How well a caption fits its clip, {name: cosine}, by a SigLIP model (arXiv 2303.15343).

    clips: {name: ClipFacts with embeddings}; captions: {name: text}. A SigLIP sees single frames
    and reads short texts, so a caption counts by its first sentence (who is to be seen) and the
    frame that fits it best. Notebook 01.
    """
    texts = {name: canonical_text(first_sentence(captions[name])) for name in captions}
    unique = sorted(set(texts.values()))
    length = model.config.text_config.max_position_embeddings
    vectors = {}
    for start in range(0, len(unique), batch_size):
        chunk = unique[start : start + batch_size]
        ids = tokenizer(chunk, padding="max_length", max_length=length, truncation=True,
                        return_tensors="pt").input_ids.to(model.device)  # fmt: skip
        found = F.normalize(_vector(model.get_text_features(input_ids=ids)), dim=-1).cpu()  # (B, D)
        vectors |= dict(zip(chunk, found, strict=True))
    return {n: float((clips[n].embeddings @ vectors[texts[n]]).max()) for n in captions}


def _vector(output) -> torch.Tensor:
    """transformers 5 wraps what `get_*_features` returned as a tensor before."""
    return output if torch.is_tensor(output) else output.pooler_output


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def canonical_text(text: str) -> str:
    """Text as SigLIP was trained on it: lower case, no punctuation but commas, single spaces."""
    return " ".join(re.sub(r"[^\w\s,]", "", text.lower()).split())
