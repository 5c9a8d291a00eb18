"""The two tiny backbones of the toy world, trained from nothing and saved as Hugging Face folders.

A SigLIP-form image encoder with its text tower (sigmoid contrastive loss, arXiv 2303.15343) and a
Qwen2-form causal language model, both trained on `tlv.corpus`. Afterwards they are loaded exactly
like `google/siglip-so400m-patch14-384` and `Qwen/Qwen2.5-3B`: by a path. Taught in notebook 00.
"""

import logging
import math
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tlv import chat, corpus, questions, templates, world
from tlv.background import Background, compute_ahead
from tlv.forked_ranks import rank_and_count, run_forked, share_first, sum_gradients
from tlv.isolation import isolate, pad_rows
from tlv.optimizers import Muon, split_matrices

LOG = logging.getLogger(__name__)
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, "<|im_start|>", "<|im_end|>", "<video>")
IMAGE_SIZE, PATCH_SIZE = 48, 8  # pixels: 6 x 6 patches a frame
CAPTION_WEIGHT = 0.2  # a whole caption has many wrong frames, which would drown its words
TEXT_WEIGHT = 0.5  # of a text in the LLM's loss: what repeats in it teaches to look back
MUON_LR, ADAMW_LR = 2e-3, 1e-3  # peaks; of the layers' matrices, and of all else
ALONE_FROM = 0.54  # share of the LLM's steps after which the encoder was seen to be done
ROWS_TOGETHER = 4  # texts of like length that the LLM reads in one pass: less padding
TEXT_LENGTH = 24  # tokens of a frame caption, padded: SigLIP reads its text vector at the last one


def train_backbones(
    out_dir,
    *,
    seed: int,
    vision_steps: int,
    llm_steps: int,
    num_texts: int,
    template: str = "plain",
    vision_width: int = 128,
    vision_layers: int = 4,
    llm_width: int = 128,
    llm_layers: int = 6,
    batch_size: int = 64,
    num_rows: int = 16,
    device: str = "cpu",
) -> Background:
    """Start to train image encoder and language model; `wait` of the result gives the loss curves.

    They are written to `vision/` and `llm/` below `out_dir`. `num_texts` documents train the
    tokenizer; a step sees `batch_size` images, or `num_rows` texts with all their turns. Encoder
    and language model know nothing of each other: each is trained in a process of its own, with
    half of the CPU threads. The language model takes longer and goes first; for its last steps,
    when the encoder is done, it takes all of them, each for a process.
    """
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    rng = np.random.default_rng([seed, 10])  # a stream of its own: no scene of the world
    lessons = [corpus.write_lesson(rng, i / num_texts) for i in range(num_texts)]
    texts = [templates.render([turn], template) for turns in lessons for turn in turns]
    texts += [questions.frame_caption(facts) for facts in corpus.write_frames(rng, num_texts)[1]]
    shared = dict(tokenizer=train_tokenizer(texts), seed=seed, device=device)
    llm = dict(
        out_dir=Path(out_dir) / "llm", num_steps=llm_steps, width=llm_width,
        num_layers=llm_layers, num_rows=num_rows, template=template,
        num_threads=torch.get_num_threads(), **shared,
    )  # fmt: skip
    vision = dict(
        out_dir=Path(out_dir) / "vision", num_steps=vision_steps, width=vision_width,
        num_layers=vision_layers, batch_size=batch_size, **shared,
    )  # fmt: skip
    jobs = {"llm": (train_llm, llm), "vision": (train_vision, vision)}
    return Background(jobs, num_threads=max(1, torch.get_num_threads() // 2))


def train_tokenizer(texts, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in Qwen2's form: <|endoftext|> ends, nothing is put in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
    )


def to_pixels(frames: np.ndarray, size: int = IMAGE_SIZE) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, size, size) in -1..1, as the SigLIP processor gives."""
    small = [Image.fromarray(f).resize((size, size), Image.Resampling.BICUBIC) for f in frames]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


def siglip_loss(image: torch.Tensor, text: torch.Tensor, scale, bias, same: torch.Tensor):
    """Sigmoid loss over all pairs of a batch; `same` (captions, B) marks the pairs that match."""
    logits = text @ image.T * scale.exp() + bias  # (captions, B)
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / len(image)


def train_vision(
    out_dir,
    *,
    tokenizer,
    seed,
    num_steps,
    batch_size,
    width,
    num_layers,
    device,
):
    """Train the SigLIP-form encoder on single frames and save its folder. Returns the losses."""
    rng, _ = np.random.default_rng([seed, 1]), torch.manual_seed(seed)
    tower = dict(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 32,
    )
    config = SiglipConfig(
        vision_config=dict(**tower, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
        text_config=dict(
            **{**tower, "num_hidden_layers": 2},
            vocab_size=len(tokenizer),
            max_position_embeddings=TEXT_LENGTH,
            projection_size=width,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
    )
    model = SiglipModel(config).to(device)
    model.logit_scale.data.fill_(math.log(10.0))
    model.logit_bias.data.fill_(-2.0)
    # SigLIP's own start makes a patch's place a tenth of its content. Billions of pairs mend that;
    # from a hundred thousand, places would not be learnt at all.
    model.vision_model.embeddings.position_embedding.weight.data.normal_(std=0.5)
    losses = []
    for step, optimizers in _steps(model, num_steps):
        # One thing at a time first: what a word means is plain then. Later, how things combine.
        frames, facts = corpus.write_frames(rng, batch_size, 1 if step < num_steps // 5 else None)
        captions, truth = corpus.write_captions(facts)
        ids = _tokenize(tokenizer, captions).to(device)  # (captions, L)
        out = model(input_ids=ids, pixel_values=to_pixels(frames).to(device))
        same = torch.from_numpy(truth).to(device)  # (captions, B)
        whole, words = (
            siglip_loss(out.image_embeds, text, model.logit_scale, model.logit_bias, part)
            for text, part in zip(
                out.text_embeds.split([batch_size, len(corpus.PHRASES)]),
                same.split([batch_size, len(corpus.PHRASES)]),
                strict=True,
            )
        )
        loss = words + CAPTION_WEIGHT * whole
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        _step(model, optimizers)
        if step % 100 == 0 or step == num_steps - 1:
            best = (out.text_embeds @ out.image_embeds.T)[:batch_size].argmax(1)
            hit = same[torch.arange(batch_size), best].float().mean()
            LOG.info(f"vision step {step}: loss {losses[-1]:.3f}, a right image first: {hit:.2f}")
    processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    for part in (model, processor, tokenizer):
        part.save_pretrained(Path(out_dir))
    return losses


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
    steps = _steps(model, num_steps, hold=0.6)
    alone_from = int(ALONE_FROM * num_steps)  # by step and not by clock: every run adds up alike
    losses = _learn_texts(model, islice(steps, alone_from), batches)
    num_ranks = min(num_threads, math.ceil(num_rows / ROWS_TOGETHER))
    rest = partial(_learn_texts, model, steps, batches)
    losses += run_forked(rest, num_ranks if device == "cpu" else 1)
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
    """Share of questions that the language model answers right from scenes told frame by frame,
    per question type."""
    rng = np.random.default_rng([seed, 3])
    right = {}
    for _ in range(num_scenes):
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
        for number, question in enumerate(asked, start=1):
            hit = is_right[turn_of == number].all()
            right.setdefault(question.type, []).append(float(hit))
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def _learn_texts(model, steps, batches) -> list[float]:
    """Take steps of the LLM's training; returns the losses. Of several ranks the first has the
    batches, and each computes its share of every one."""
    losses = []
    rank, count = rank_and_count()
    for step, optimizers in steps:
        rows = share_first(next(batches) if rank == 0 else None)
        model.zero_grad()
        loss = _add_text_gradient(model, _share_out(rows, count)[rank], _loss_weights(rows))
        losses.append(sum_gradients(model, loss))
        _step(model, optimizers)
        if rank == 0 and step % 100 == 0:
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


def _tokenize(tokenizer, captions):
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def _steps(model, num_steps, hold: float = 0.0):
    """The optimizers, with a short warm-up and a cosine of their rates, one step at a time.

    Muon for the matrices of the layers, AdamW for all else. The rates stay at their peak for the
    share `hold` of the steps.
    """
    matrices, others = split_matrices(model)
    optimizers = {
        Muon(matrices, lr=MUON_LR, weight_decay=0.01): MUON_LR,
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.01): ADAMW_LR,
    }
    warmup = max(1, num_steps // 20)
    model.train()
    for step in range(num_steps):
        falling = max(0.0, step / num_steps - hold) / (1 - hold)
        share = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * falling)))
        for optimizer, peak in optimizers.items():
            optimizer.param_groups[0]["lr"] = peak * share
        yield step, optimizers


def _step(model, optimizers) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def measure_retrieval(model, tokenizer, *, seed: int, num_images: int) -> dict:
    """Share of captions whose image scores highest among fresh ones: `top1`, and `top5`."""
    frames, facts = corpus.write_frames(np.random.default_rng([seed, 4]), num_images)
    captions, truth = (part[:num_images] for part in corpus.write_captions(facts))
    ids = _tokenize(tokenizer, captions).to(model.device)
    out = model(input_ids=ids, pixel_values=to_pixels(frames).to(model.device))
    same = torch.from_numpy(truth).to(model.device)  # (B, B)
    ranked = (out.text_embeds @ out.image_embeds.T).argsort(1, descending=True)  # (B, B)
    hits = same.gather(1, ranked)  # (B, B)
    return {
        "top1": float(hits[:, 0].float().mean()),
        "top5": float(hits[:, :5].any(1).float().mean()),
    }
