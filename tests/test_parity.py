"""The whole model again, from its saved weights alone: pixels to loss in matrix products.

Nothing of tlv or transformers computes here; a difference anywhere on the way (feature layer,
groups, positions, order of the fusion, mask, shift of the labels) shows in the loss.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tlv import chat

HEADS = dict(vision=2, connector=2, llm=4, llm_kv=2)  # of the small model in conftest.py
PATCH, GROUPS = 8, 4


def attend(q, k, v, heads, bias=0.0):
    """(n, h d), (m, h d), (m, h d) -> (n, h d)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))  # (h, n, d)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def encode(w, pixels):
    """SigLIP up to the layer before the last: pixels (T, 3, H, W) -> (T, N, D_v)."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    found = []
    for frame in pixels:
        tiles = frame.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (3, n, n, P, P)
        tiles = tiles.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)  # (N, 3 P P)
        x = tiles @ w["embeddings.patch_embedding.weight"].flatten(1).T
        x = x + w["embeddings.patch_embedding.bias"] + w["embeddings.position_embedding.weight"]
        for i in range(2):  # of three
            at = f"encoder.layers.{i}."
            y = norm(x, at + "layer_norm1")
            q, k, v = (linear(y, f"{at}self_attn.{name}_proj") for name in "qkv")
            x = x + linear(attend(q, k, v, HEADS["vision"]), at + "self_attn.out_proj")
            y = F.gelu(linear(norm(x, at + "layer_norm2"), at + "mlp.fc1"), approximate="tanh")
            x = x + linear(y, at + "mlp.fc2")
        found.append(x)
    return torch.stack(found)


def resample(w, features):
    """The group resampler: features (S, D_v) -> (Q, D). TinyLLaVA-Video, section 3."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    media, size = features @ w["linear.weight"].T + w["linear.bias"], len(features) // GROUPS
    groups = []
    for g in range(GROUPS):
        z, m = w["latents"], media[g * size : (g + 1) * size]
        n, m = norm(z, "layers.0.0.norm_latents"), norm(m, "layers.0.0.norm_media")
        k, v = (torch.cat([m, n]) @ w["layers.0.0.to_kv.weight"].T).chunk(2, -1)
        y = attend(n @ w["layers.0.0.to_q.weight"].T, k, v, HEADS["connector"])
        z = z + y @ w["layers.0.0.to_out.weight"].T
        y = F.gelu(norm(z, "layers.0.1.0") @ w["layers.0.1.1.weight"].T)
        z = z + y @ w["layers.0.1.3.weight"].T
        groups.append(norm(z, "norm"))
    y = torch.cat(groups)  # (Q, D)
    position, column = torch.arange(len(y))[:, None], torch.arange(0, y.shape[1], 2)
    angle = position * torch.exp(column * -(math.log(10_000) / y.shape[1]))
    table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1).half().float()  # as published
    return y + table


def read(w, x):
    """Qwen2: embeddings (L, D) -> logits (L, V)."""

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}.weight"]

    def turn(x, heads):
        """Rotary positions: halves of each head, base 10,000."""
        x = x.unflatten(-1, (heads, -1))  # (L, h, d)
        half = x.shape[-1] // 2
        angle = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        sin, cos = angle.sin()[:, None], angle.cos()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    mask = torch.full((len(x), len(x)), -torch.inf).triu(1)
    share = HEADS["llm"] // HEADS["llm_kv"]
    for i in range(2):
        at = f"model.layers.{i}."
        y = norm(x, at + "input_layernorm")
        q, k, v = (y @ w[f"{at}self_attn.{n}_proj.weight"].T + w[f"{at}self_attn.{n}_proj.bias"]
                   for n in "qkv")  # fmt: skip
        q, k = turn(q, HEADS["llm"]), turn(k, HEADS["llm_kv"])
        k, v = (t.repeat_interleave(share, 1).flatten(1)
                for t in (k, v.unflatten(-1, (HEADS["llm_kv"], -1))))  # fmt: skip
        y = attend(q.flatten(1), k, v, HEADS["llm"], mask)
        x = x + y @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm")
        gate, up, down = (w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
        x = x + (F.silu(y @ gate) * (y @ up)) @ down
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.mark.parametrize("seed", [0, 1])
def test_pixels_to_loss_by_matrix_products_alone(tiny, model_dir, clip_frames, seed):
    model, processor = tiny
    state = load_file(model_dir / "model.safetensors")
    vision, connector, llm = (
        {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
        for part in ("vision_encoder.", "connector.", "language_model.")
    )
    pixels = processor.process_frames(clip_frames(4, seed))  # (T, C, H, W)
    turns = [("<video>\nWhat is he doing?", "Running."), ("Where?", "In a park.")]
    row = chat.encode(turns, "qwen2_base", processor.tokenizer, 8)
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])

    tokens = resample(connector, encode(vision, pixels).flatten(0, 1))  # (Q, D)
    x = llm["model.embed_tokens.weight"][ids]  # (L, D)
    x[ids == model.config.video_token_id] = tokens
    logits = read(llm, x)  # (L, V)
    asked = labels[1:] != chat.IGNORE_INDEX
    loss = F.cross_entropy(logits[:-1][asked], labels[1:][asked])

    # A second, shorter row, so that the first is not alone and the other is padded.
    short = chat.encode([("<video>\nWhere?", "In.")], "qwen2_base", processor.tokenizer, 8)
    batch = processor.tokenizer.pad(
        {"input_ids": [row["input_ids"], short["input_ids"]]}, padding_side="left",
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        alone = model(input_ids=ids[None], labels=labels[None], pixel_values_videos=pixels[None])
        both = model(**batch, pixel_values_videos=torch.stack([pixels, pixels.flip(0)]))
    assert torch.allclose(alone.logits[0], logits, atol=1e-5)
    assert torch.allclose(both.logits[0], logits, atol=1e-5)
    assert float(alone.loss) == pytest.approx(float(loss), rel=1e-5)
