"""OpenELM: published widths and counts, the model again in plain products, published folders."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tlv.openelm import OpenELMConfig, make_divisible
from tlv.pretrained import load_pretrained, read_config

# Typed out from the published config.json of the smallest one (270M).
PUBLISHED = {
    "activation_fn_name": "swish", "architectures": ["OpenELMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_openelm.OpenELMConfig",
                 "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM"},
    "bos_token_id": 1, "eos_token_id": 2, "ffn_dim_divisor": 256,
    "ffn_multipliers": [0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3,
                        3.53, 3.77, 4.0],
    "ffn_with_glu": True, "head_dim": 64, "initializer_range": 0.02, "max_context_length": 2048,
    "model_dim": 1280, "model_type": "openelm", "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": True, "num_gqa_groups": 4, "num_transformer_layers": 16,
    "qkv_multipliers": [0.5, 1.0], "rope_freq_constant": 10000, "rope_max_length": 4096,
    "share_input_output_layers": True, "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
SMALL = dict(vocab_size=50, model_dim=32, head_dim=8, num_transformer_layers=3, num_gqa_groups=2,
             ffn_dim_divisor=16, max_context_length=64, initializer_range=0.2)  # fmt: skip


@pytest.fixture
def small():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("openelm", **SMALL)).eval()


def test_widths_grow_from_layer_to_layer_as_published():
    config = OpenELMConfig(**{k: v for k, v in PUBLISHED.items() if k != "model_type"})
    assert config.num_query_heads == [12] * 5 + [16] * 7 + [20] * 4
    assert config.num_kv_heads == [3] * 5 + [4] * 7 + [5] * 4
    assert config.ffn_dims[:3] == [768, 1024, 1280] and config.ffn_dims[-1] == 5120
    two = OpenELMConfig(**{**PUBLISHED, "ffn_multipliers": [0.5, 4.0]})
    assert two.ffn_dims == config.ffn_dims


def test_a_width_is_never_more_than_a_tenth_below_what_was_asked_for():
    wanted = {3: 16, 17: 16, 17.8: 32, 24: 32, 33: 32}
    assert {value: make_divisible(value, 16) for value in wanted} == wanted


@pytest.mark.parametrize(
    "layers, width, head, count",
    [(16, 1280, 64, 271_527_168), (20, 1536, 64, 457_179_136), (28, 2048, 64, 1_079_891_456),
     (36, 3072, 128, 3_036_647_424)],
)  # fmt: skip
def test_published_sizes(layers, width, head, count):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            OpenELMConfig(num_transformer_layers=layers, model_dim=width, head_dim=head))
    assert sum(p.numel() for p in model.parameters()) == count


def compute(w, config, ids):
    """Ids (L,) -> logits (L, V) by matrix products alone, as the published code orders them."""

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}.weight"]

    def turn(x):
        """(h, L, d): halves of each head, by position."""
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    x = w["transformer.token_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for i in range(config.num_transformer_layers):
        at, heads = f"transformer.layers.{i}.", config.num_query_heads[i]
        y = norm(x, at + "attn_norm") @ w[at + "attn.qkv_proj.weight"].T
        y = y.unflatten(-1, (-1, config.head_dim)).transpose(0, 1)  # (h, L, d)
        q, k, v = y[:heads], *y[heads:].chunk(2)
        q, k = turn(norm(q, at + "attn.q_norm")), turn(norm(k, at + "attn.k_norm"))
        k, v = (t.repeat_interleave(config.num_gqa_groups, 0) for t in (k, v))
        y = (q @ k.mT / math.sqrt(config.head_dim) + mask).softmax(-1) @ v
        x = x + y.transpose(0, 1).flatten(1) @ w[at + "attn.out_proj.weight"].T
        gate, up = (norm(x, at + "ffn_norm") @ w[at + "ffn.proj_1.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ w[at + "ffn.proj_2.weight"].T
    return norm(x, "transformer.norm") @ w["transformer.token_embeddings.weight"].T


def test_the_model_by_matrix_products_alone(small):
    ids = torch.randint(50, (9,), generator=torch.Generator().manual_seed(1))
    for name, weight in small.named_parameters():  # norms of one would hide a norm left out
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    with torch.no_grad():
        assert torch.allclose(small(ids[None]).logits[0],
                              compute(small.state_dict(), small.config, ids), atol=1e-5)


def test_pieces_through_the_cache_and_isolated_rows_equal_the_whole(small):
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = small(ids).logits
        first = small(ids[:, :7], use_cache=True)
        second = small(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
        # Tokens 0 to 3, then two continuations that do not see each other.
        segments = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
        look = torch.ones(12, 12).tril().bool()
        look &= (segments[:, None] == segments) | (segments == 0)
        places = torch.tensor([[*range(8), *range(4, 8)]])
        joint = small(ids[:1], attention_mask=look[None, None], position_ids=places).logits[0]
        alone = small(torch.cat([ids[:1, :4], ids[:1, 8:]], dim=1)).logits[0]
    assert torch.allclose(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-5)
    assert torch.allclose(joint[:8], whole[0, :8], atol=1e-5)
    assert torch.allclose(joint[8:], alone[4:], atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(small):
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(3))
    small.train()
    small(ids, labels=ids).loss.backward()
    wanted = [p.grad.clone() for p in small.parameters()]
    small.zero_grad()
    small.activation_checkpointing_enable()
    small(ids, labels=ids, use_cache=False).loss.backward()
    for parameter, grad in zip(small.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, grad, atol=1e-6)


def test_a_published_folder_loads_and_none_of_its_code_runs(small, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    config = {**PUBLISHED, **SMALL, "ffn_multipliers": [0.5, 2.25, 4.0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {name: w.clone() for name, w in small.state_dict().items()}
    del weights["lm_head.weight"]  # published files hold it once, as the embeddings
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("configuration_openelm.py", "modeling_openelm.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    again = load_pretrained(AutoModelForCausalLM, tmp_path, "llm_dir").eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)
    assert not hasattr(again.config, "auto_map")
    assert read_config(tmp_path, "llm_dir").hidden_size == 32
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "fields, message",
    [(dict(ffn_multipliers=[1.0, 2.0, 3.0, 4.0]), "ffn_multipliers has 4 values for 3 layers"),
     (dict(ffn_with_glu=False), "ffn_with_glu = False"),
     (dict(normalization_layer_name="layer_norm"), "OpenELM has true and 'rms_norm'")],
)  # fmt: skip
def test_another_design_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenELMConfig(**SMALL, **fields)
