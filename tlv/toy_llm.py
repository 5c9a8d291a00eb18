"""The language model of the toy world: a small Qwen2, trained from nothing on texts alone.

The texts tell scenes frame by frame and ask about them (`tlv.corpus`). Its folder is loaded like
that of `Qwen/Qwen2.5-3B`. Taught in notebook 00.
"""

import logging
import math
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from tlv import chat, corpus, questions, world
from tlv.background import compute_ahead
from tlv.forked_ranks import run_forked, sum_gradients
from tlv.intervals import clustered_interval
from tlv.isolation import isolate, pad_rows
from tlv.ranks import ALONE, Ranks
from tlv.toy_steps import rated_steps, take_step

LOG = logging.getLogger(__name__)
TEXT_WEIGHT = 0.5  # of a text in the loss: what repeats in it teaches to look back
ALONE_FROM = 0.56  # share of the steps after which the encoder has a few seconds left, or none
ROWS_TOGETHER = 4  # texts of like length that are read in one pass: less padding


def train_llm(
    out_dir,
    *,
    tokenizer,
    seed,
    num_steps,
    num_rows,
    width,
    num_layers,
    template,
    num_threads,
    device,
):
    """Train the Qwen2-form language model on texts and save its folder. Returns the losses."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width // 2,  # depth pays more than width: an answer in several steps
        num_hidden_layers=num_layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        initializer_range=width**-0.5,  # 0.02 suits a width of some thousand
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).to(device)
    # Words on the scale of video tokens, which the resampler's LayerNorm and positions set to one.
    model.model.embed_tokens.weight.data.normal_(std=0.7)
    write = partial(write_step, seed=seed, num_steps=num_steps, num_rows=num_rows,
                    template=template, tokenizer=tokenizer)  # fmt: skip
    batches = compute_ahead(write, range(num_steps))
    steps = rated_steps(model, num_steps, hold=0.6)
    alone_from = int(ALONE_FROM * num_steps)  # by step and not by clock: every run adds up alike
    losses = _learn_texts(model, islice(steps, alone_from), batches, ALONE)
    num_ranks = min(num_threads, math.ceil(num_rows / ROWS_TOGETHER))
    rest = partial(_learn_texts, model, steps, batches)
    losses += run_forked(rest, num_ranks if device == "cpu" else 1)
    if losses:
        LOG.info(f"llm: {num_steps} steps, last loss {losses[-1]:.3f}")
    model.save_pretrained(Path(out_dir))
    tokenizer.save_pretrained(Path(out_dir))
    return losses


def write_step(step: int, *, seed, num_steps, num_rows, template, tokenizer) -> list[dict]:
    """The rows of one step of the LLM's training, one text and all turns about it each."""
    rng = np.random.default_rng([seed, 2, step])
    lessons = [corpus.write_lesson(rng, step / num_steps) for _ in range(num_rows)]
    rows = [
        isolate([chat.encode([turn], template, tokenizer) for turn in turns]) for turns in lessons
    ]
    return sorted(rows, key=lambda row: len(row["input_ids"]))  # like ones together: less padding


@torch.no_grad()
def measure_reading(
    model, tokenizer, template: str, *, seed: int, num_scenes: int, choice_share: float = 0.0
) -> dict:
    """How many questions the language model answers right from scenes told frame by frame.

    Per question type {"": share, "/low", "/high": its 95% interval, clustered by scene}.
    """
    rng = np.random.default_rng([seed, 3])
    right = {}
    for number in range(num_scenes):
        scene = world.sample_scene(rng)
        told = questions.frame_log(scene, 6)
        asked = questions.ask(scene, rng)
        turns = [questions.write_turn(question, rng, choice_share) for question in asked]
        encoded = [
            chat.encode([(f"{told}\n{text}", answer)], template, tokenizer)
            for text, answer in turns
        ]
        row = isolate(encoded)
        batch = {key: value.to(model.device) for key, value in pad_rows([row], 0).items()}
        label = batch.pop("labels")[0, 1:]  # (L - 1,)
        guess = model(**batch).logits[0, :-1].argmax(-1)  # (L - 1,)
        is_right = (guess == label) | (label == chat.IGNORE_INDEX)
        turn_of = torch.tensor(row["segments"][1:], device=model.device)
        for turn, question in enumerate(asked, start=1):
            hit = float(is_right[turn_of == turn].all())
            right.setdefault(question.type, []).append((hit, number))
    shares = {}
    for kind, rows in right.items():
        hits, scenes = zip(*rows, strict=True)
        low, high = clustered_interval(hits, scenes)
        shares[kind] = {"": sum(hits) / len(hits), "/low": low, "/high": high}
    return shares


def _learn_texts(model, steps, batches, ranks: Ranks) -> list[float]:
    """Take steps of the LLM's training; returns the losses. Of several ranks the first has the
    batches, and each computes its share of every one."""
    losses = []
    for step, optimizers in steps:
        rows = ranks.share(next(batches) if ranks.is_first else None)
        model.zero_grad()
        mine = _share_out(rows, ranks.world_size)[ranks.rank]
        loss = _add_text_gradient(model, mine, _loss_weights(rows))
        sum_gradients(model, ranks)
        losses += ranks.sum(loss)
        take_step(model, optimizers)
        if ranks.is_first and step % 100 == 0:
            LOG.info(f"llm step {step}: loss {losses[-1]:.3f}")
    return losses


def _loss_weights(rows) -> tuple[float, float]:
    """What an answer's token and a text's token weigh in the loss: the mean over the answers' plus,
    at half the weight, that over the texts'."""
    num_answers = sum(label != chat.IGNORE_INDEX for row in rows for label in row["labels"][1:])
    num_told = sum(row["segments"].count(0) - 1 for row in rows)  # the first is never predicted
    return 1 / max(num_answers, 1), TEXT_WEIGHT / max(num_told, 1)


def _share_out(rows, count: int) -> list[list]:
    """Rows in order of length, as parts of like length, these in shares of like work."""
    parts = [rows[i : i + ROWS_TOGETHER] for i in range(0, len(rows), ROWS_TOGETHER)]
    turn = 2 * count  # there and back: the shortest goes with the longest
    return [parts[k::turn] + parts[turn - 1 - k :: turn] for k in range(count)]


def _add_text_gradient(model, parts, weights) -> float:
    """Gradient and loss of parts of a step's rows: -log p of answers and of texts, weighted."""
    total = 0.0
    for rows in parts:
        batch = {key: value.to(model.device) for key, value in pad_rows(rows, 0).items()}
        targets = batch.pop("labels")[:, 1:]  # (R, L - 1)
        shared = torch.tensor([row["segments"].count(0) for row in rows], device=model.device)
        is_answer = targets != chat.IGNORE_INDEX
        is_text = torch.arange(targets.shape[1], device=model.device) + 1 < shared[:, None]
        hidden = model.model(**batch).last_hidden_state[:, :-1]  # (R, L - 1, D)
        pairs = (is_answer, targets), (is_text, batch["input_ids"][:, 1:])
        nll = [
            F.cross_entropy(model.lm_head(hidden[chosen]), truth[chosen], reduction="sum")
            for chosen, truth in pairs
        ]
        loss = torch.stack(nll) @ nll[0].new_tensor(weights)
        loss.backward()
        total += loss.item()
    return total
