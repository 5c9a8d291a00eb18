"""What a model says to a list of questions.

A question is a dict {"id", "video", "type", "form": "free" | "choice", "question", "answer",
"options", "unseen_pair"}. Every question is asked alone, greedily. What an answer is worth says
`tlv.evaluate`. Taught in notebook 05.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tlv import long_video
from tlv.background import map_forked
from tlv.chat import encode, query_of, stop_token_ids, with_video
from tlv.selector import QueryError
from tlv.video import VideoError


@dataclass(frozen=True)
class Answer:
    """What the model says; `confidence` is the probability that it gives this very answer.

    `error` says why there is none (a clip that cannot be decoded); then the text is empty.
    """

    text: str
    confidence: float = 0.0
    error: str = ""


def blind(questions: list[dict]) -> list[dict]:
    """The same questions without their clips: what language alone gives away."""
    return [{**question, "video": None} for question in questions]


def with_other_clip(questions: list[dict], seed: int) -> list[dict]:
    """The same questions on another clip of the same set, one and the same for all of a clip's.

    The clips are put into a random ring and each takes the next one's place, so that none keeps
    its own. ValueError if there is only one clip.
    """
    names = sorted({question["video"] for question in questions})
    if len(names) < 2:
        raise ValueError(f"{len(names)} clip: another clip's video needs at least 2")
    ring = np.random.default_rng(seed).permutation(names)
    other = dict(zip(ring.tolist(), np.roll(ring, 1).tolist(), strict=True))
    return [{**question, "video": other[question["video"]]} for question in questions]


@torch.inference_mode()
def generate_answers(model, processor, questions: list[dict], videos_dir, *, batch_size: int = 32,
                     max_new_tokens: int = 32, timeout_s=None, frames_of: Callable | None = None,
                     progress: Callable = iter,
                     num_processes: int = 1) -> list[Answer]:  # fmt: skip
    """Greedy answers, in the order of `questions`; a question whose "video" is None is asked blind.

    Questions of one clip follow each other, so that each clip is decoded and encoded once. Rows are
    padded on the left and clips go in as features (T, N, D_v). A clip that cannot be decoded gives
    an Answer with its error. `frames_of` gives a "video"'s frames (T, H, W, 3) uint8 where others
    are wanted than the model samples. `progress` wraps the batches (tqdm). Several processes of one
    thread each share the batches where `num_processes` says so: for a small model on a CPU.

    A model that chooses frames by the question takes a question's `query`, or else its first line,
    and one clip at a time; then a query that the selector refuses, or a clip beyond the LLM's
    context, gives an Answer with its error, and neither `timeout_s`, `frames_of` nor
    `num_processes` applies.
    """
    is_training = model.training
    model.eval()
    if processor.selector is not None:
        answers = _answer_long(model, processor, questions, videos_dir, batch_size, max_new_tokens,
                               progress)
        model.train(is_training)
        return answers

    def place(i):
        return questions[i]["video"] or "", len(questions[i]["question"]), i

    def sample(name):
        return processor.sample(Path(videos_dir) / name, timeout_s).frames

    first: dict = {}  # of questions asked alike, such as blind ones, only the first is put
    for i, question in enumerate(questions):
        first.setdefault((question["video"], question["question"]), i)
    order = sorted(first.values(), key=place)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    clips: dict = {}

    def answer(batch) -> dict[int, Answer]:
        nonlocal clips
        names = {questions[i]["video"] for i in batch} - {None}
        clips = {n: clips.get(n) for n in names}  # what the last batch saw and this one needs
        for name in sorted(n for n in names if clips[n] is None):
            clips[name] = _encode_clip(model, processor, frames_of or sample, name)
        bad = {i for i in batch if isinstance(clips.get(questions[i]["video"]), VideoError)}
        found = {i: Answer("", error=str(clips[questions[i]["video"]].reason)) for i in bad}
        good = [i for i in batch if i not in bad]
        if good:
            rows = [(questions[i]["question"], clips.get(questions[i]["video"])) for i in good]
            found |= dict(zip(good, _generate(model, processor, rows, max_new_tokens), strict=True))
        return found

    found = {}
    count = min(num_processes, max(1, len(batches)))
    for _, some in zip(progress(batches), map_forked(answer, batches, count), strict=True):
        found |= some
    model.train(is_training)
    return [found[first[question["video"], question["question"]]] for question in questions]


def _answer_long(model, processor, questions, videos_dir, batch_size, max_new_tokens, progress):
    ends, found = stop_token_ids(model.config.template, processor.tokenizer), {}
    names = [question["video"] for question in questions]
    queries = [query_of(question, [(question["question"], None)]) for question in questions]
    blind_ones = [i for i, name in enumerate(names) if name is None]
    for start in range(0, len(blind_ones), batch_size):
        batch = blind_ones[start : start + batch_size]
        rows = [(questions[i]["question"], None) for i in batch]
        found |= dict(zip(batch, _generate(model, processor, rows, max_new_tokens), strict=True))
    for name in progress(sorted(set(names) - {None})):
        path, its = Path(videos_dir) / name, [i for i, n in enumerate(names) if n == name]
        for i in its:
            try:
                processor.selector.embed_text(queries[i])
                long_video.check_question(model, processor, path, questions[i]["question"],
                                          max_new_tokens)
            except (QueryError, long_video.BudgetError) as error:
                found[i] = Answer("", error=str(error))
            except VideoError as error:
                found[i] = Answer("", error=error.reason)
        its = [i for i in its if i not in found]
        if not its:
            continue
        asked = [(questions[i]["question"], queries[i]) for i in its]
        try:
            said = long_video.generate(model, processor, path, asked, max_new_tokens)
        except VideoError as error:
            found |= {i: Answer("", error=error.reason) for i in its}
            continue
        for i, one in zip(its, said, strict=True):
            tokens, log_probs = torch.tensor(one.tokens), torch.tensor(one.log_probs)
            found[i] = _to_answer(tokens, log_probs, ends, processor.tokenizer)
    return [found[i] for i in range(len(questions))]


def _encode_clip(model, processor, frames_of, name):
    """A clip as the model sees it: features (T, N, D_v), or the VideoError."""
    try:
        frames = frames_of(name)  # (T, H, W, 3)
    except VideoError as error:
        return error
    pixels = processor.process_frames(frames)  # (T, C, H, W)
    return model.vision_features(pixels.to(model.device, model.dtype))


def _generate(model, processor, rows: list[tuple], max_new_tokens: int) -> list[Answer]:
    """rows: (question, features (T, N, D_v) or None). One batch, padded on the left."""
    tokenizer, template = processor.tokenizer, model.config.template
    prompts, features, index = [], [], []
    for question, clip in rows:
        num_tokens = None
        if clip is not None:
            question = with_video(question)
            num_tokens = model.connector.num_tokens(clip.shape[0] * clip.shape[1])
            if not any(clip is known for known in features):
                features.append(clip)
            index.append(next(k for k, known in enumerate(features) if known is clip))
        prompts.append(encode([(question, None)], template, tokenizer, num_tokens)["input_ids"])
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts])  # (B, L)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    visual = {}
    if features:
        visual = {"video_features": features,
                  "video_index": torch.tensor(index, device=model.device)}  # fmt: skip
    ends = stop_token_ids(template, tokenizer)
    out = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **visual,
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    new = out.sequences[:, -len(out.logits) :]  # (B, new)
    steps = [
        logits.float().log_softmax(-1).gather(-1, token[:, None])
        for logits, token in zip(out.logits, new.T, strict=True)
    ]
    new, chosen = new.cpu(), torch.cat(steps, dim=1).cpu()  # (B, new) each
    return [_to_answer(*row, ends, tokenizer) for row in zip(new, chosen, strict=True)]


def _to_answer(tokens, log_probs, ends: list[int], tokenizer) -> Answer:
    """Cut at the first end token; the confidence counts the end too."""
    stops = [place for place, token in enumerate(tokens.tolist()) if token in ends]
    count = stops[0] + 1 if stops else len(tokens)
    text = tokenizer.decode(tokens[:count], skip_special_tokens=True).strip()
    return Answer(text, float(log_probs[:count].sum().exp()))
