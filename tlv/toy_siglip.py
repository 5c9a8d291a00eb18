"""The vision encoder of the toy world: a small SigLIP with its text tower, trained from nothing.

Sigmoid contrastive loss (arXiv 2303.15343) on single frames with captions (`tlv.corpus`). Its
folder is loaded like that of `google/siglip-so400m-patch14-384`. Taught in notebook 00.
"""

import logging
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tlv import corpus
from tlv.toy_steps import rated_steps, take_step

LOG = logging.getLogger(__name__)
IMAGE_SIZE, PATCH_SIZE = 48, 8  # pixels: 6 x 6 patches a frame
CAPTION_WEIGHT = 0.2  # a whole caption has many wrong frames, which would drown its words
TEXT_LENGTH = 24  # tokens of a frame caption, padded: SigLIP reads its text vector at the last one


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
    for step, optimizers in rated_steps(model, num_steps):
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
        take_step(model, optimizers)
        if step % 100 == 0 or step == num_steps - 1:
            best = (out.text_embeds @ out.image_embeds.T)[:batch_size].argmax(1)
            hit = same[torch.arange(batch_size), best].float().mean()
            LOG.info(f"vision step {step}: loss {losses[-1]:.3f}, a right image first: {hit:.2f}")
    processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    for part in (model, processor, tokenizer):
        part.save_pretrained(Path(out_dir))
    return losses


def siglip_loss(image: torch.Tensor, text: torch.Tensor, scale, bias, same: torch.Tensor):
    """Sigmoid loss over all pairs of a batch; `same` (captions, B) marks the pairs that match."""
    logits = text @ image.T * scale.exp() + bias  # (captions, B)
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / len(image)


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


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, IMAGE_SIZE, IMAGE_SIZE) in -1..1, as SigLIP reads."""
    size = IMAGE_SIZE, IMAGE_SIZE
    small = [Image.fromarray(f).resize(size, Image.Resampling.BICUBIC) for f in frames]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _tokenize(tokenizer, captions):
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
