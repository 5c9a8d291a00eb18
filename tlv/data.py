"""Samples of a manifest -> micro-batches (their order is that of `tlv.order`).

A sample that cannot be used (clip missing, undecodable or hanging; conversation that does not
alternate; sequence too long) becomes a `BadSample`: skipped, counted and listed, never replaced.
So is, though used, one of which a turn is left out, that quotes its template, or that a converted
model cuts, as it was trained to. Taught in notebooks 03 and 04.
"""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tlv.bad_samples import BadSample
from tlv.chat import (
    IGNORE_INDEX,
    check_stop,
    encode,
    odd_turns,
    parse_conversation,
    query_of,
    video_token_id,
    visual_of,
    with_video,
)
from tlv.config import ConfigError
from tlv.isolation import isolate, pad_rows
from tlv.positions import spread
from tlv.processor import stack_equal
from tlv.selector import QueryError
from tlv.templates import VIDEO_TOKEN, ConversationError, is_quoted
from tlv.video import VideoError
from tlv.vision import count_patches, picture_size

# ---- one sample -----------------------------------------------------------------------------


class VideoTextDataset(Dataset):
    """Manifest samples as encoded rows and a clip; a bad one as a BadSample (nothing is raised).

    turns = "packed": one row per sample, all its turns in one sequence (the published form).
    turns = "separate": a row per turn, each question alone; the rows share the sample's clip.
    turns = "isolated": one row per sample, and no turn sees another: what "separate" computes,
    with the clip's tokens once.
    `cache` (a filled FeatureCache) gives what the vision encoder made of the clip, in its place.
    `gap_seed` (None: no gaps) spreads positions over the LLM's context, each sample's always alike.

    A processor with a selector also gives keyframes, for the sample's `query`, or the first line of
    its first question where it has none. Where "video" is a list of files, they are shown one after
    another.
    """

    def __init__(self, samples, videos_dir, model, processor, *, template=None, turns="packed",
                 timeout_s=None, cache=None, gap_seed=None):
        if not Path(videos_dir).is_dir():
            raise ConfigError(f"videos_dir = {videos_dir}: no such folder")
        self.samples, self.videos_dir, self.cache = samples, Path(videos_dir), cache
        self.names = names_of(samples)
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.config, self.turns, self.timeout_s = model.config, turns, timeout_s
        self.gap_seed = gap_seed
        self.template = template or self.config.template
        check_stop(self.template, self.tokenizer, "the model")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int) -> dict | BadSample:
        sample, name = self.samples[index], self.names[index]
        if not isinstance(sample, dict):
            return BadSample(name, f"{sample!r:.80} is no JSON object")
        try:
            turns, notes = parse_conversation(sample), odd_turns(sample)
            if is_quoted(turns, self.template):
                notes.append("a turn holds words of the template, and is learnt as it stands")
            clip = self._load(sample)
            num_frames = None if clip is None else len(clip)
            rows = self._encode(turns, num_frames)
            cut = sum(row.pop("num_cut") for row in rows)
            if self.gap_seed is not None:
                rows = self._spread(rows, np.random.default_rng([self.gap_seed, index]))
            keys = {} if clip is None else self._select(sample, turns)
        except VideoError as error:  # its path may be absolute: name the file as the manifest does
            return BadSample(name, f"{visual_of(sample)}: {error.reason}")
        except (ConversationError, BadRow, QueryError) as error:
            return BadSample(name, str(error))
        if cut:
            notes.append(f"{cut} tokens beyond max_seq_len = {self.config.max_seq_len} are cut")
        notes = [BadSample(name, "; ".join(notes), is_used=True)] if notes else []
        return {"id": name, "clip": clip, "rows": rows, "notes": notes, **keys}

    def usable(self, limit: int) -> list[dict]:
        """The first `limit` samples that are not bad: what a notebook can show. Raises BadRow."""
        items = ((sample, self[index]) for index, sample in enumerate(self.samples))
        good = [s for s, item in islice((x for x in items if isinstance(x[1], dict)), limit)]
        if not good:
            first = f"; the first: {self[0].reason}" if len(self) else ""
            raise BadRow(f"all {len(self)} samples are bad{first}")
        return good

    def path(self, sample) -> Path | None:
        """The sample's clip or picture; None for a sample of text alone."""
        paths = self.paths(sample)
        return paths[0] if paths else None

    def paths(self, sample) -> list[Path]:
        """The files that a sample shows one after the other; none for a sample of text alone."""
        files = visual_of(sample)
        files = [] if files is None else files if isinstance(files, list) else [files]
        if not all(isinstance(file, str) and file for file in files):
            raise VideoError(repr(visual_of(sample)),
                             "'video' must be a file name relative to videos_dir, or some of them")
        return [self.videos_dir / file for file in files]

    def _load(self, sample) -> torch.Tensor | None:
        paths = self.paths(sample)
        parts = [self.read(path) if self.cache is None else self.cache[path] for path in paths]
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None

    def read(self, path) -> torch.Tensor:
        """Decode one clip or picture -> (T, C, H, W) float32. Raises VideoError."""
        frames = self.processor.sample(path, self.timeout_s).frames  # (T, H, W, 3)
        return self.processor.process_frames(frames)

    def _encode(self, turns, num_frames: int | None) -> list[dict]:
        """Rows of input_ids and labels; `num_frames` None is a sample of text alone."""
        num_tokens = None if num_frames is None else self.processor.num_tokens(num_frames)
        conversations = [turns]
        if self.turns != "packed":
            is_visual = num_frames is not None
            conversations = [[(with_video(q) if is_visual else q, a)] for q, a in turns]
        rows = [encode(c, self.template, self.tokenizer, num_tokens) for c in conversations]
        if self.turns == "isolated":
            rows = [isolate(rows)]
        limits = self.config.max_seq_len, self.config.long_rows, video_token_id(self.tokenizer)
        return [fit_row(row, *limits) for row in rows]

    def _spread(self, rows, rng) -> list[dict]:
        placeholder = video_token_id(self.tokenizer)
        limit = self.config.text_config.max_position_embeddings
        try:
            return [spread(row, [token == placeholder for token in row["input_ids"]], limit, rng)
                    for row in rows]
        except ValueError as error:  # a row longer than the LLM's context
            raise BadRow(str(error)) from error

    def _select(self, sample, turns) -> dict:
        """Keyframes and the query's embedding, where the model wants them."""
        if self.processor.selector is None:
            return {}
        embed = self.processor.embed if self.cache is None else self.cache.embeddings.get
        frames = torch.cat([embed(path) for path in self.paths(sample)])  # (T, D_q)
        keyframes, vector = self.processor.choose(frames, query_of(sample, turns))
        return {"keyframes": keyframes, "query": vector}

    def blank(self) -> dict:
        """An item that weighs nothing: one black clip, no answer. It fills a bad sample's place.

        Every rank so runs the same modules equally often, and none waits for another.
        """
        vision, num_frames = self.config.vision_config, self.processor.num_frames
        if self.processor.sampling == "fps":
            num_frames = 1
        if self.cache is None:
            size = picture_size(vision)
            clip = torch.zeros(num_frames, vision.num_channels, size, size)
        else:
            num_patches = count_patches(vision, self.config.drop_first_patch)
            clip = torch.zeros(num_frames, num_patches, vision.hidden_size)
        num_tokens = self.processor.num_tokens(num_frames)
        row = encode([(VIDEO_TOKEN, "")], self.template, self.tokenizer, num_tokens)
        keys = {}
        if self.processor.selector is not None:
            keys = {"keyframes": torch.tensor([0]), "query": torch.zeros(self.config.query_width)}
        return {"id": "", "clip": clip, "notes": [], **keys,
                "rows": [{**row, "labels": [IGNORE_INDEX] * len(row["input_ids"])}]}


def names_of(samples) -> list[str]:
    """What to call each sample: its id, with its place where the id is another's too."""
    ids = [str(s["id"]) if isinstance(s, dict) and "id" in s else "" for s in samples]
    count = Counter(ids)
    return [name if name and count[name] == 1 else f"{name} #{index}".strip()
            for index, name in enumerate(ids)]


class BadRow(ValueError):
    """A row that cannot be trained on."""


def fit_row(row: dict, max_seq_len: int, long_rows: str, placeholder: int) -> dict:
    """The row with `num_cut`, the tokens that were cut off its end. Raises BadRow.

    long_rows = "skip" refuses a row that is too long. "cut" is what published code does: as video
    tokens stand in the row already, this equals cutting after the fusion. A row without an answer,
    or whose clip would be cut, is refused.
    """
    ids, kept = row["input_ids"], {name: values[:max_seq_len] for name, values in row.items()}
    advice = f"max_seq_len is {max_seq_len}; split the conversation or take fewer video tokens"
    if len(ids) > max_seq_len and long_rows == "skip":
        raise BadRow(f"its sequence has {len(ids)} tokens, {advice}")
    if placeholder in ids[max_seq_len:]:
        raise BadRow(f"its clip ends beyond what is kept of {len(ids)} tokens, {advice}")
    if all(label == IGNORE_INDEX for label in row["labels"]):
        raise BadRow("no token of it is an answer; give every turn an answer")
    if all(label == IGNORE_INDEX for label in kept["labels"]):
        raise BadRow(f"no answer is among what is kept of {len(ids)} tokens, {advice}")
    return {**kept, "num_cut": max(0, len(ids) - max_seq_len)}


# ---- micro-batches --------------------------------------------------------------------------


def collate(items, *, num_clips: int, blank: dict, pad_id: int,
            clip_key: str = "pixel_values_videos") -> dict:
    """Items -> one micro-batch of exactly `num_clips` clips, padded on the right.

    Returns input_ids, labels, attention_mask (R, L), or (R, 1, L, L) with position_ids (R, L)
    where turns are isolated, `clips` (num_clips, T, ...) or a list where
    lengths differ, the model's name for them (clip_key), video_index (visual rows,) and `bad`,
    a list of BadSample (skipped, or used and noted); of a model with a selector also keyframes, a
    list of (K,), and queries.
    """
    bad = [item for item in items if isinstance(item, BadSample)]
    good = [item for item in items if not isinstance(item, BadSample)]
    bad += [note for item in good for note in item["notes"]]
    num_visual = sum(item["clip"] is not None for item in good)
    good += [blank] * (num_clips - num_visual)
    rows, clips, video_index = [], [], []
    for item in good:
        rows += item["rows"]
        if item["clip"] is not None:
            video_index += [len(clips)] * len(item["rows"])
            clips.append(item["clip"])
    selected = [item for item in good if "keyframes" in item]
    keys = {}
    if selected:
        keys = {"keyframes": [item["keyframes"] for item in selected],
                "queries": torch.stack([item["query"] for item in selected])}  # (num_clips, D_q)
    return {
        **pad_rows(rows, pad_id),
        **keys,
        "clips": stack_equal(clips),
        "clip_key": clip_key,
        "video_index": torch.tensor(video_index),
        "bad": bad,
    }


def make_loader(dataset, batches, micro_batch_size: int, num_workers: int) -> DataLoader:
    """Collated micro-batches of the samples in `batches`, in that order."""
    blank, pad_id = dataset.blank(), dataset.tokenizer.pad_token_id
    clip_key = "pixel_values_videos" if dataset.cache is None else "video_features"
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers,
        collate_fn=lambda items: collate(items, num_clips=micro_batch_size, blank=blank,
                                         pad_id=pad_id, clip_key=clip_key),
        generator=torch.Generator().manual_seed(0),  # leave the global one alone
        multiprocessing_context="fork" if num_workers else None,
    )
