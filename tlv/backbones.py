"""The two tiny backbones of the toy world, trained from nothing and saved as Hugging Face folders.

A SigLIP-form image encoder with its text tower (sigmoid contrastive loss, arXiv 2303.15343) and a
Qwen2-form causal language model. Both learn from a corpus of scenes of their own, without the
held-out pairs. Afterwards they are loaded exactly like `google/siglip-so400m-patch14-384` and
`Qwen/Qwen2.5-3B`: by a path. Taught in notebook 00.
"""

import math
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tlv import chat, questions, world

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, "<|im_start|>", "<|im_end|>", "<video>")
IMAGE_SIZE, PATCH_SIZE = 48, 8  # pixels: 6 x 6 patches a frame
WORDS = (*world.SIZES, *world.COLOURS, *world.SHAPES, *world.PLACES)
PHRASES = (  # the shortest captions
    *((word,) for word in WORDS),
    *world.SEEN_PAIRS,
    *((size, colour) for size in world.SIZES for colour in world.COLOURS),
)
CHOICE_SHARE = 0.7  # of the questions in the LLM's corpus: the letters are what is hard
HARD_TYPES = {"direction": 2.0, "order": 2.0}  # asked so much more often in that corpus
CAPTION_WEIGHT = 0.2  # a whole caption has many wrong frames, which would drown its words
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
    llm_layers: int = 4,
    batch_size: int = 64,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Train tokenizer, image encoder and language model; write `vision/` and `llm/` to `out_dir`.

    Returns the two loss curves. `num_texts` documents train the tokenizer. Encoder and language
    model know nothing of each other: they are trained side by side, in a process each with half
    of the CPU threads. Their progress goes to stderr.
    """
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    rng = np.random.default_rng([seed, 0])
    texts = [chat.render(write_text(rng), template) for _ in range(num_texts)]
    texts += [questions.frame_caption(facts) for facts in write_frames(rng, num_texts)[1]]
    shared = dict(tokenizer=train_tokenizer(texts), seed=seed, batch_size=batch_size, device=device)
    with ProcessPoolExecutor(
        max_workers=2,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, torch.get_num_threads() // 2),),
    ) as pool:
        vision = pool.submit(
            train_vision, Path(out_dir) / "vision", num_steps=vision_steps, width=vision_width,
            num_layers=vision_layers, **shared,
        )  # fmt: skip
        llm = pool.submit(
            train_llm, Path(out_dir) / "llm", num_steps=llm_steps, width=llm_width,
            num_layers=llm_layers, template=template, **shared,
        )  # fmt: skip
        return {"vision": vision.result(), "llm": llm.result()}


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


def write_text(
    rng: np.random.Generator, num_things: int | None = None, num_frames: int = 6
) -> list[tuple[str, str]]:
    """A text of the language model's corpus: a scene in words, then a question about it.

    Most scenes are told in a caption. The others are told frame by frame, which teaches to compare
    what is said at different times.
    """
    scene = world.sample_scene(rng, num_things=num_things)
    asked = questions.ask(scene, rng)
    weights = np.array([HARD_TYPES.get(question.type, 1.0) for question in asked])
    question = asked[rng.choice(len(asked), p=weights / weights.sum())]
    text, answer = questions.write_turn(question, rng, CHOICE_SHARE)
    is_log = rng.random() < 0.3
    told = questions.frame_log(scene, num_frames) if is_log else questions.caption(scene)
    return [(f"{told}\n{text}", answer)]


def write_retelling(rng: np.random.Generator) -> list[tuple[str, str]]:
    """A text of that corpus: a scene told frame by frame, then its caption."""
    scene = world.sample_scene(rng)
    told = questions.frame_log(scene, 6)
    return [(f"{told}\n{questions.CAPTION_REQUEST}", questions.caption(scene))]


def write_lesson(rng: np.random.Generator, progress: float) -> list[tuple[str, str]]:
    """A text for a moment of training, `progress` from 0 to 1: the easy ones first.

    Naming the letter of an option is a skill of its own, and from long texts it is not learnt at
    all: options alone come first, then scenes of one thing, then scenes of any number.
    """
    kind = rng.random()
    if progress < 0.25 or kind < 0.05:
        return [questions.write_match(rng)]
    if progress < 0.7:
        return write_text(rng, num_things=1, num_frames=4)
    return write_retelling(rng) if kind < 0.2 else write_text(rng)


def write_frames(rng: np.random.Generator, count: int, num_things: int | None = None):
    """Frames for the image encoder, (count, H, W, 3) uint8, and for each the facts it shows."""
    frames, facts = [], []
    for _ in range(count):
        scene = world.sample_scene(rng, num_things=num_things or int(rng.integers(1, 4)))
        frame = int(rng.integers(scene.num_frames))
        frames.append(world.render(scene, [frame])[0])
        facts.append(questions.frame_facts(scene, frame))
    return np.stack(frames), facts


def write_captions(facts) -> tuple[list[str], np.ndarray]:
    """Captions of a batch of frames, and which are true of which: (captions, frames) bool.

    One caption of each frame tells all. Beside them stand the shortest captions there are, single
    words such as "ring" or "top left", each true of many frames. From these the encoder learns in
    a few hundred steps what it would otherwise have to untangle from whole captions.
    """
    captions = [questions.frame_caption(one) for one in facts]
    truth = [[caption == other for other in captions] for caption in captions]
    truth += [[any(set(p) <= set(fact) for fact in one) for one in facts] for p in PHRASES]
    return captions + [" ".join(phrase) for phrase in PHRASES], np.array(truth)


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
    lr=1e-3,
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
    for step, optimizer in _steps(model, num_steps, lr):
        # One thing at a time first: what a word means is plain then. Later, how things combine.
        frames, facts = write_frames(rng, batch_size, 1 if step < num_steps // 5 else None)
        captions, truth = write_captions(facts)
        ids = _tokenize(tokenizer, captions).to(device)  # (captions, L)
        out = model(input_ids=ids, pixel_values=to_pixels(frames).to(device))
        same = torch.from_numpy(truth).to(device)  # (captions, B)
        whole, words = (
            siglip_loss(out.image_embeds, text, model.logit_scale, model.logit_bias, part)
            for text, part in zip(
                out.text_embeds.split([batch_size, len(PHRASES)]),
                same.split([batch_size, len(PHRASES)]),
                strict=True,
            )
        )
        loss = words + CAPTION_WEIGHT * whole
        losses.append(_update(model, optimizer, loss))
        if step % 100 == 0 or step == num_steps - 1:
            best = (out.text_embeds @ out.image_embeds.T)[:batch_size].argmax(1)
            hit = same[torch.arange(batch_size), best].float().mean()
            _say(f"vision step {step}: loss {losses[-1]:.3f}, a right image first: {hit:.2f}")
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
    batch_size,
    width,
    num_layers,
    template,
    device,
    lr=1e-3,
):
    """Train the Qwen2-form language model on texts and save its folder. Returns the losses."""
    rng, _ = np.random.default_rng([seed, 2]), torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
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
    losses = []
    for step, optimizer in _steps(model, num_steps, lr, hold=0.6):
        texts = [write_lesson(rng, step / num_steps) for _ in range(batch_size)]
        rows = [chat.encode(turns, template, tokenizer) for turns in texts]
        rows.sort(key=lambda row: len(row["input_ids"]))  # short ones together: less padding
        halves = rows[: batch_size // 2], rows[batch_size // 2 :]
        parts = [_answer_nll(model, half, device) for half in halves]
        loss = sum(nll for nll, _ in parts) / sum(count for _, count in parts)
        losses.append(_update(model, optimizer, loss))
        if step % 100 == 0 or step == num_steps - 1:
            _say(f"llm step {step}: loss {losses[-1]:.3f}")
    model.save_pretrained(Path(out_dir))
    tokenizer.save_pretrained(Path(out_dir))
    return losses


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
        for question in questions.ask(scene, rng):
            text, answer = questions.write_turn(question, rng, choice_share)
            turns = [(f"{told}\n{text}", answer)]
            row = {k: torch.tensor([v]) for k, v in chat.encode(turns, template, tokenizer).items()}
            guess = model(input_ids=row["input_ids"].to(model.device)).logits[0, :-1].argmax(-1)
            label = row["labels"][0, 1:].to(model.device)
            hit = ((guess == label) | (label == chat.IGNORE_INDEX)).all()
            right.setdefault(question.type, []).append(float(hit))
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def _answer_nll(model, rows, device):
    """Sum of -log p over the answer tokens of some rows, and their number."""
    # Right padding needs no mask: no label looks at it. Its own id does not matter.
    ids, labels = (
        pad_sequence(
            [torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=fill
        ).to(device)  # (B, L)
        for key, fill in (("input_ids", 0), ("labels", chat.IGNORE_INDEX))
    )
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)  # (B * (L - 1), V)
    targets = labels[:, 1:].flatten()  # (B * (L - 1),)
    nll = F.cross_entropy(logits, targets, ignore_index=chat.IGNORE_INDEX, reduction="sum")
    return nll, (targets != chat.IGNORE_INDEX).sum()


def _tokenize(tokenizer, captions):
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def _say(line):
    print(line, file=sys.stderr, flush=True)


def _steps(model, num_steps, lr, hold: float = 0.0):
    """AdamW with a short warm-up and a cosine, one step at a time.

    The rate stays at its peak for the share `hold` of the steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, num_steps // 20)
    model.train()
    for step in range(num_steps):
        falling = max(0.0, step / num_steps - hold) / (1 - hold)
        share = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * falling)))
        optimizer.param_groups[0]["lr"] = lr * share
        yield step, optimizer


def _update(model, optimizer, loss) -> float:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def measure_retrieval(model, tokenizer, *, seed: int, num_images: int) -> dict:
    """Share of captions whose image scores highest among fresh ones: `top1`, and `top5`."""
    frames, facts = write_frames(np.random.default_rng([seed, 4]), num_images)
    captions, truth = (part[:num_images] for part in write_captions(facts))
    ids = _tokenize(tokenizer, captions).to(model.device)
    out = model(input_ids=ids, pixel_values=to_pixels(frames).to(model.device))
    same = torch.from_numpy(truth).to(model.device)  # (B, B)
    ranked = (out.text_embeds @ out.image_embeds.T).argsort(1, descending=True)  # (B, B)
    hits = same.gather(1, ranked)  # (B, B)
    return {
        "top1": float(hits[:, 0].float().mean()),
        "top5": float(hits[:, :5].any(1).float().mean()),
    }
