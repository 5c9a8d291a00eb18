"""The two tiny backbones of the toy world, trained from nothing and saved as Hugging Face folders.

A SigLIP-form image encoder with its text tower (sigmoid contrastive loss, arXiv 2303.15343) and a
Qwen2-form causal language model. Both learn from a corpus of scenes of their own, without the
held-out pairs. Afterwards they are loaded exactly like `google/siglip-so400m-patch14-384` and
`Qwen/Qwen2.5-3B`: by a path. Taught in notebook 00.
"""

import math
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
CAPTION_WEIGHT = 0.1  # a whole caption has many wrong frames, which would drown its words
TEXT_LENGTH = 24  # tokens of a frame caption, padded: SigLIP reads its text vector at the last one


def train_backbones(
    out_dir,
    *,
    seed: int,
    vision_steps: int,
    llm_steps: int,
    num_texts: int,
    template: str = "plain",
    width: int = 128,
    num_layers: int = 4,
    batch_size: int = 64,
    device: str = "cpu",
    log=print,
) -> dict[str, list[float]]:
    """Train tokenizer, image encoder and language model; write `vision/` and `llm/` to `out_dir`.

    Returns the two loss curves. `num_texts` documents train the tokenizer.
    """
    rng = np.random.default_rng([seed, 0])
    texts = [chat.render(write_conversation(rng), template) for _ in range(num_texts)]
    texts += [questions.frame_caption(facts) for facts in write_frames(rng, num_texts)[1]]
    tokenizer = train_tokenizer(texts)
    shape = dict(width=width, num_layers=num_layers, seed=seed, device=device, log=log)
    vision = train_vision(
        Path(out_dir) / "vision",
        tokenizer=tokenizer,
        num_steps=vision_steps,
        batch_size=batch_size,
        lr=1e-3,
        **shape,
    )
    llm = train_llm(
        Path(out_dir) / "llm",
        tokenizer=tokenizer,
        num_steps=llm_steps,
        batch_size=batch_size // 4,
        lr=2e-3,
        template=template,
        **shape,
    )
    return {"vision": vision, "llm": llm}


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


def write_conversation(
    rng: np.random.Generator, num_things: int | None = None, num_frames: int = 8
) -> list[tuple[str, str]]:
    """A text of the language model's corpus: a scene in words, then all questions about it.

    Half of the scenes are told frame by frame, half in a caption: to answer, the model must look
    up what the text says, and for direction and order compare what it says at different times.
    """
    scene = world.sample_scene(rng, num_things=num_things)
    told = questions.caption(scene)
    log = questions.frame_log(scene, num_frames)
    asked = questions.ask(scene, rng)
    turns = []
    for index in rng.permutation(len(asked)):
        question = asked[index]
        if rng.random() < 0.4:
            text, answer, _ = questions.as_choice(question, rng)
        else:
            text, answer = question.text, question.answer
        turns.append((text, answer))
    if rng.random() < 0.5:
        told = log
        turns.insert(0, ("Describe the video.", questions.caption(scene)))
    turns[0] = (f"{told}\n{turns[0][0]}", turns[0][1])
    return turns


def write_frames(rng: np.random.Generator, count: int, num_things: int | None = None):
    """Frames for the image encoder, (count, H, W, 3) uint8, and for each the facts it shows."""
    frames, facts = [], []
    for _ in range(count):
        scene = world.sample_scene(rng, num_things=num_things)
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
    truth += [[any(word in fact for fact in one) for one in facts] for word in WORDS]
    return captions + list(WORDS), np.array(truth)


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
    lr,
    width,
    num_layers,
    device="cpu",
    log=print,
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
        frames, facts = write_frames(rng, batch_size, 1 if step < num_steps // 2 else None)
        captions, truth = write_captions(facts)
        ids = _tokenize(tokenizer, captions).to(device)  # (captions, L)
        out = model(input_ids=ids, pixel_values=to_pixels(frames).to(device))
        same = torch.from_numpy(truth).to(device)  # (captions, B)
        whole, words = (
            siglip_loss(out.image_embeds, text, model.logit_scale, model.logit_bias, part)
            for text, part in zip(
                out.text_embeds.split([batch_size, len(WORDS)]),
                same.split([batch_size, len(WORDS)]),
                strict=True,
            )
        )
        loss = words + CAPTION_WEIGHT * whole
        losses.append(_update(model, optimizer, loss))
        if step % 100 == 0 or step == num_steps - 1:
            best = (out.text_embeds @ out.image_embeds.T)[:batch_size].argmax(1)
            hit = same[torch.arange(batch_size), best].float().mean()
            log(f"vision step {step}: loss {losses[-1]:.3f}, a right image first: {hit:.2f}")
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
    lr,
    width,
    num_layers,
    template,
    device="cpu",
    log=print,
):
    """Train the Qwen2-form language model on texts and save its folder. Returns the losses."""
    rng, _ = np.random.default_rng([seed, 2]), torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64),
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
    for step, optimizer in _steps(model, num_steps, lr):
        # One thing at a time first, as for the encoder.
        num_things = 1 if step < num_steps // 3 else None
        texts = [write_conversation(rng, num_things) for _ in range(batch_size)]
        rows = [chat.encode(turns, template, tokenizer) for turns in texts]
        ids, labels = (
            pad_sequence(
                [torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=fill
            ).to(device)  # (B, L)
            for key, fill in (("input_ids", tokenizer.pad_token_id), ("labels", chat.IGNORE_INDEX))
        )
        # Right padding needs no mask: no label looks at it.
        loss = model(input_ids=ids, labels=labels).loss
        losses.append(_update(model, optimizer, loss))
        if step % 100 == 0 or step == num_steps - 1:
            log(f"llm step {step}: loss {losses[-1]:.3f} ")
    model.save_pretrained(Path(out_dir))
    tokenizer.save_pretrained(Path(out_dir))
    return losses


@torch.no_grad()
def measure_reading(model, tokenizer, template: str, *, seed: int, num_scenes: int) -> dict:
    """Share of questions that the language model answers right from a text, per question type."""
    rng = np.random.default_rng([seed, 3])
    right = {}
    for _ in range(num_scenes):
        scene = world.sample_scene(rng)
        told = questions.frame_log(scene, 8)
        for question in questions.ask(scene, rng):
            turns = [(f"{told}\n{question.text}", question.answer)]
            row = {k: torch.tensor([v]) for k, v in chat.encode(turns, template, tokenizer).items()}
            guess = model(input_ids=row["input_ids"].to(model.device)).logits[0, :-1].argmax(-1)
            label = row["labels"][0, 1:].to(model.device)
            hit = ((guess == label) | (label == chat.IGNORE_INDEX)).all()
            right.setdefault(question.type, []).append(float(hit))
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def _tokenize(tokenizer, captions):
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def _steps(model, num_steps, lr):
    """AdamW with a short warm-up and a cosine, one step at a time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, num_steps // 20)
    model.train()
    for step in range(num_steps):
        share = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
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
