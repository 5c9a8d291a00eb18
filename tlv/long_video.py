"""Ask about a clip of any length: two passes over the file, and memory that hardly grows with it.

The first pass embeds every frame and chooses keyframes for the question (`tlv.selector`). The
second encodes and merges, chunk by chunk. Then the video tokens go through the LLM in pieces, once
for all questions that share their keyframes. No more than two chunks of CHUNK frames are ever in
memory; what grows is the tokens and the LLM's cache. Source: ViLAMP (arXiv 2504.02438) section 4;
the published code holds all frames at once. Taught in notebook 06.
"""

from dataclasses import dataclass

import torch

from tlv.chat import encode, stop_token_ids, with_video
from tlv.kv_cache import make_cache
from tlv.merging import MergeStream
from tlv.selector import CHUNK, FRAME_S
from tlv.video_child import read_chunks_within

PREFILL = 32  # tokens through the LLM at once: attention holds (h, PREFILL, S) scores, which grow


class BudgetError(ValueError):
    """A clip whose video tokens do not fit into the LLM's context; says what to change."""


@dataclass(frozen=True)
class Said:
    """An answer: its tokens, and log p of each."""

    tokens: list[int]
    log_probs: list[float]


@torch.inference_mode()
def generate(model, processor, path, asked, max_new_tokens: int = 32) -> list[Said]:
    """Greedy answers to `asked`, (question, query) pairs about one clip, each asked alone.

    The query is what frames are compared with: the question, or a few words of it. Questions with
    the same query share keyframes, video tokens and the LLM's cache. Raises VideoError, QueryError,
    and BudgetError before anything is decoded.
    """
    numbers, _ = processor.plan(path)
    prompts = [_prompt(model, processor, question) for question, _ in asked]
    longest = max(len(ids) for ids in prompts) - 1  # the placeholder is counted with the clip
    room = processor.num_tokens(len(numbers)) + longest + max_new_tokens
    check_budget(model, processor, len(numbers), longest + max_new_tokens)
    queries = list(dict.fromkeys(query for _, query in asked))
    frames = processor.embed(path)  # (T, D_q), once for all queries
    looks = [processor.choose(frames, query) for query in queries]
    said = {}
    for query, tokens in zip(queries, encode_clip(model, processor, path, looks), strict=True):
        cache, shared = make_cache(model.language_model.config, room), None
        for index, ((_, its), ids) in enumerate(zip(asked, prompts, strict=True)):
            if its != query:
                continue
            place = ids.index(model.config.video_token_id)
            if shared is None:
                prefill(model, _embed(model, ids[:place]), cache)
                prefill(model, tokens[None], cache)
                shared = cache.get_seq_length()
            said[index] = _decode(model, processor, cache, ids[place + 1 :], max_new_tokens)
            cache.crop(shared - cache.get_seq_length())  # back to the clip alone
    return [said[index] for index in range(len(asked))]


def _prompt(model, processor, question: str) -> list[int]:
    """Token ids with one placeholder for the whole clip."""
    return encode([(with_video(question), None)], model.config.template, processor.tokenizer,
                  num_video_tokens=1)["input_ids"]


def check_question(model, processor, path, question: str, max_new_tokens: int) -> None:
    """Raise BudgetError unless the LLM's context holds the clip, this question and its answer."""
    numbers, _ = processor.plan(path)
    num_text = len(_prompt(model, processor, question)) - 1  # without the placeholder
    check_budget(model, processor, len(numbers), num_text + max_new_tokens)


def check_budget(model, processor, num_frames: int, num_text: int) -> None:
    """Raise BudgetError unless the clip's video tokens and `num_text` others fit the LLM's context.

    Nothing is ever cut: what would be lost is the question, which stands at the end.
    """
    context = model.language_model.config.max_position_embeddings
    num_video = processor.num_tokens(num_frames)
    if num_video + num_text <= context:
        return
    per_key, per_frame = processor.tokens_per_keyframe, processor.tokens_per_frame
    num_keys = min(num_frames, processor.num_keyframes)
    room = context - num_text - num_keys * per_key  # for the other frames
    fits = num_keys + room // per_frame if per_frame and room >= 0 else 0
    advice = (f"lower max_frames (the cap) to at most {fits}, or fps" if fits >= num_keys and fits
              else f"the keyframes alone are too many: lower num_keyframes (K) below "
                   f"{max(0, context - num_text) // per_key + 1}, or keyframe_grid")
    raise BudgetError(
        f"{num_frames} frames with {num_keys} keyframes of {per_key} tokens are {num_video} video "
        f"tokens; with {num_text} of text and answer that is {num_video + num_text}, more than the "
        f"LLM's context of {context}: {advice}"
    )


@torch.inference_mode()
def encode_clip(model, processor, path, looks) -> list[torch.Tensor]:
    """The second pass: video tokens (S, D) for each of `looks`, (keyframes, query embedding).

    Each frame is decoded and encoded once, however many looks there are.
    """
    numbers, _ = processor.plan(path)
    device, dtype = model.device, model.dtype
    streams = [MergeStream(model.connector.merging, keys, query.to(device))
               for keys, query in looks]
    shape = processor.num_tokens(len(numbers)), model.config.text_config.hidden_size
    tokens = [torch.empty(shape, dtype=dtype, device=device) for _ in looks]  # (S, D)
    filled = [0] * len(looks)

    def take(frames):  # what it makes of a chunk is gone before the next one is decoded
        pixels = processor.process_frames(frames).to(device, dtype)  # (n, C, H, W)
        features = model.vision_features(pixels)  # (n, N, D_v)
        for k, stream in enumerate(streams):
            for is_keyframe, rows in stream.feed(features):
                rows = model.connector.project(is_keyframe, rows)
                tokens[k][filled[k] : filled[k] + len(rows)] = rows
                filled[k] += len(rows)

    for frames in read_chunks_within(FRAME_S, path, numbers, CHUNK):
        take(frames)
    for stream in streams:
        stream.close()
    return tokens


@torch.inference_mode()
def prefill(model, embeds, cache) -> torch.Tensor | None:
    """Embeddings (1, L, D) into the LLM's cache, PREFILL at a time -> the last logits (V,)."""
    logits = None
    for piece in embeds.split(PREFILL, dim=1):
        if piece.shape[1]:
            out = model.language_model(inputs_embeds=piece, past_key_values=cache, use_cache=True,
                                       logits_to_keep=1)
            logits = out.logits[0, -1].float()  # (V,)
    return logits


def _embed(model, ids) -> torch.Tensor:
    return model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long, device=model.device))


def _decode(model, processor, cache, ids, max_new_tokens) -> Said:
    """Greedy, from the end of the question on; the placeholder is never said."""
    ends = stop_token_ids(model.config.template, processor.tokenizer)
    hushed = model.generation_config.suppress_tokens or []
    said = Said([], [])
    while len(said.tokens) < max_new_tokens and not set(said.tokens[-1:]) & set(ends):
        logits = prefill(model, _embed(model, ids), cache)
        log_probs = logits.log_softmax(-1)
        logits[hushed] = -torch.inf
        token = int(logits.argmax())
        said.tokens.append(token)
        said.log_probs.append(float(log_probs[token]))
        ids = [token]
    return said
