"""The whole model again, from its saved weights alone: pixels to loss in matrix products.

Nothing of tlv or transformers computes here; a difference anywhere on the way (feature layer,
groups, positions, order of the fusion, mask, shift of the labels) shows in the loss. So for Qwen2
and Phi, and for the two connectors that no golden number is known of.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PhiConfig, PhiForCausalLM

from tlv import chat
from tlv.builders import build_model
from tlv.connectors import build_connector

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
    """The group resampler: features (S, D_v) -> (Q, D). TinyLLaVA-Video's published code."""

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


def read_bench(w, x, heads, num_layers):
    """TinyLLaVABench's resampler: features (S, D_v) -> (Q, D). Keys are the patches' alone."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    z = w["latents"]
    for i in range(num_layers):
        at = f"layers.{i}."
        n, m = norm(z, at + "0.norm_latents"), norm(x, at + "0.norm_media")
        k, v = (m @ w[at + "0.to_kv.weight"].T).chunk(2, -1)
        y = attend(n @ w[at + "0.to_q.weight"].T, k, v, heads)
        z = z + y @ w[at + "0.to_out.weight"].T
        y = F.gelu(norm(z, at + "1.0") @ w[at + "1.1.weight"].T)
        z = z + y @ w[at + "1.3.weight"].T
    return norm(z, "norm") @ w["out.weight"].T


def read_qformer(w, x, heads, num_layers):
    """BERT's layers, each normed after its sum; every second one, from 0 on, reads the patches."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def add(x, y, at):
        y = x + linear(y, at + ".dense")
        return F.layer_norm(y, y.shape[-1:], w[f"{at}.LayerNorm.weight"],
                            w[f"{at}.LayerNorm.bias"], 1e-12)  # fmt: skip

    def look(z, media, at):
        q = linear(z, at + ".attention.query")
        k, v = (linear(media, f"{at}.attention.{name}") for name in ("key", "value"))
        return add(z, attend(q, k, v, heads), at + ".output")

    z = F.layer_norm(w["latents"], w["latents"].shape[-1:], eps=1e-12)
    for i in range(num_layers):
        at = f"bert.layer.{i}."
        z = look(z, z, at + "attention")
        if i % 2 == 0:
            z = look(z, x, at + "crossattention")
        z = add(z, F.gelu(linear(z, at + "intermediate_query.dense")), at + "output_query")
    return linear(z, "out")


def turn(x):
    """Rotary positions (L, h, d): halves of each head, base 10,000."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    sin, cos = angle.sin()[:, None], angle.cos()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def read_qwen2(w, x):
    """Embeddings (L, D) -> logits (L, V)."""

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}.weight"]

    mask = torch.full((len(x), len(x)), -torch.inf).triu(1)
    share = HEADS["llm"] // HEADS["llm_kv"]
    for i in range(2):
        at = f"model.layers.{i}."
        y = norm(x, at + "input_layernorm")
        q, k, v = (y @ w[f"{at}self_attn.{n}_proj.weight"].T + w[f"{at}self_attn.{n}_proj.bias"]
                   for n in "qkv")  # fmt: skip
        q, k = (turn(t.unflatten(-1, (h, -1)))
                for t, h in ((q, HEADS["llm"]), (k, HEADS["llm_kv"])))  # fmt: skip
        k, v = (t.repeat_interleave(share, 1).flatten(1)
                for t in (k, v.unflatten(-1, (HEADS["llm_kv"], -1))))  # fmt: skip
        y = attend(q.flatten(1), k, v, HEADS["llm"], mask)
        x = x + y @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm")
        gate, up, down = (w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
        x = x + (F.silu(y @ gate) * (y @ up)) @ down
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def read_phi(w, x):
    """Embeddings (L, D) -> logits (L, V): both branches read the same norm, the head has a bias."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    mask = torch.full((len(x), len(x)), -torch.inf).triu(1)
    for i in range(2):
        at = f"model.layers.{i}."
        y = norm(x, at + "input_layernorm")
        q, k, v = (linear(y, f"{at}self_attn.{n}_proj") for n in "qkv")
        q, k = (t.unflatten(-1, (HEADS["llm"], -1)) for t in (q, k))  # (L, h, d)
        q, k = (torch.cat([turn(t[..., :4]), t[..., 4:]], -1).flatten(1) for t in (q, k))  # of 8
        z = linear(attend(q, k, v, HEADS["llm"], mask), at + "self_attn.dense")
        y = F.gelu(linear(y, at + "mlp.fc1"), approximate="tanh")
        x = x + z + linear(y, at + "mlp.fc2")
    return linear(norm(x, "model.final_layernorm"), "lm_head")


def shake(module):
    """Every weight off its first value: no bias is 0, no norm's weight 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()


def parts_of(folder):
    """The saved weights of encoder, connector and LLM."""
    state = load_file(folder / "model.safetensors")
    return (
        {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
        for part in ("vision_encoder.", "connector.", "language_model.")
    )


@pytest.mark.parametrize("name, read", [("bench_resampler", read_bench), ("qformer", read_qformer)])
@torch.no_grad()
def test_connectors_without_golden_numbers(name, read):
    torch.manual_seed(0)
    connector = shake(build_connector(name, vision_width=24, llm_width=40, num_queries=5,
                                      num_groups=1, num_layers=3, num_heads=4, width=32))
    x, w = torch.randn(2, 7, 24), connector.state_dict()
    y = connector(x)
    for row in range(2):
        assert torch.allclose(y[row], read(w, x[row], 4, 3), atol=1e-5)


@pytest.fixture
def phi_dir(tmp_path, tokenizer):
    """A PhiForCausalLM folder: width 32, 2 layers, half of each head turned, a head with a bias."""
    torch.manual_seed(3)
    config = PhiConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, partial_rotary_factor=0.5, max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    shake(PhiForCausalLM(config)).save_pretrained(tmp_path / "phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    return tmp_path / "phi"


def test_pixels_to_logits_of_phi(vision_dir, phi_dir, clip_frames, tmp_path):
    built = build_model(vision_dir, phi_dir, template="phi", num_queries=8, num_groups=GROUPS,
                        num_resampler_layers=1, resampler_heads=2, resampler_head_dim=8,
                        num_frames=4)  # fmt: skip
    for part in built:
        part.save_pretrained(tmp_path / "whole")
    model, processor = built
    vision, connector, llm = parts_of(tmp_path / "whole")
    pixels = processor.process_frames(clip_frames(4))  # (T, C, H, W)
    row = chat.encode([("<video>\nWhere?", "In a park.")], "phi", processor.tokenizer, 8)
    ids = torch.tensor(row["input_ids"])
    x = llm["model.embed_tokens.weight"][ids]  # (L, D)
    tokens = resample(connector, encode(vision, pixels).flatten(0, 1))  # (Q, D)
    x[ids == model.config.video_token_id] = tokens
    with torch.no_grad():
        logits = model(input_ids=ids[None], pixel_values_videos=pixels[None]).logits[0]
    assert llm["lm_head.bias"].abs().max() > 0.1
    assert torch.allclose(logits, read_phi(llm, x), atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_pixels_to_loss_by_matrix_products_alone(tiny, model_dir, clip_frames, seed):
    model, processor = tiny
    vision, connector, llm = parts_of(model_dir)
    pixels = processor.process_frames(clip_frames(4, seed))  # (T, C, H, W)
    turns = [("<video>\nWhat is he doing?", "Running."), ("Where?", "In a park.")]
    row = chat.encode(turns, "qwen2_base", processor.tokenizer, 8)
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])

    tokens = resample(connector, encode(vision, pixels).flatten(0, 1))  # (Q, D)
    x = llm["model.embed_tokens.weight"][ids]  # (L, D)
    x[ids == model.config.video_token_id] = tokens
    logits = read_qwen2(llm, x)  # (L, V)
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
