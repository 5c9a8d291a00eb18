"""Adapters: trained alone, saved as PEFT has them, merged, and gone on with."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from toy_manifest import make_world
from transformers import AutoConfig, AutoModelForCausalLM

from tlv import train
from tlv.builders import load_model
from tlv.config import ConfigError
from tlv.lora import adapter_weights, add_adapters, merge, save_adapter, target_names
from tlv.pretrained import ModelFolderError
from tlv.runlog import read_log
from tlv.train_config import TrainConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), 6)


@pytest.fixture(params=["tied", "untied"])
def start_dir(request, build_tiny, tmp_path, llm_dir):
    """A saved model whose LLM's head is, or is not, its embeddings."""
    model, processor = build_tiny()
    if request.param == "untied":
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * 0.2)
        for config in (model.config, model.config.text_config, model.language_model.config):
            config.tie_word_embeddings = False
    for part in (model, processor):
        part.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def configure(start_dir, world, tmp_path):
    def make(name, **changes):
        values = dict(
            model_dir=str(start_dir), data=str(world / "data.json"), videos_dir=str(world),
            out_dir=str(tmp_path / name), num_steps=3, trainable=("connector", "llm"),
            lora=("llm",), lora_rank=4, lora_alpha=8.0, lora_dropout=0.0, lr_connector=1e-3,
            lr_llm=1e-2, micro_batch_size=2, device="cpu", decode_timeout_s=None)  # fmt: skip
        return TrainConfig(**(values | changes))

    return make


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def first_loss(config):
    return read_log(Path(config.out_dir) / "log.jsonl")[0]["loss"]


def test_adapters_train_alone_and_the_checkpoint_is_merged(configure, start_dir):
    config = configure("out")
    train.train(config)
    before, after = weights(start_dir), weights(Path(config.out_dir) / "checkpoint")
    assert set(before) == set(after)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    matrices = {n for n in before if n.startswith("language_model.") and "_proj.weight" in n}
    assert {n for n in changed if n.startswith("language_model.")} == matrices
    assert not any(n.startswith("vision_encoder.") for n in changed)
    base, _ = load_model(start_dir)
    adapter = Path(config.out_dir) / "checkpoint/adapter"
    theirs = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    assert all(torch.allclose(theirs[n], after[n], atol=1e-6) for n in matrices)
    report = json.loads((Path(config.out_dir) / "report.json").read_text())
    assert 0 < report["trained_parameters"]["llm"] < sum(before[n].numel() for n in matrices)


def test_adapters_on_the_encoder_too(configure, start_dir):
    """Factory's tune_type_vision_tower: lora. All that is trained moves, the unseen layer stays."""
    config = configure("out", trainable=("connector", "llm", "vision"), lora=("llm", "vision"),
                       lr_vision=1e-2)  # fmt: skip
    train.train(config)
    before, after = weights(start_dir), weights(Path(config.out_dir) / "checkpoint")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    layers = {f"vision_encoder.encoder.layers.{k}." for k in (0, 1)}  # of three
    matrices = {n for n in before if n.endswith(".weight") and before[n].ndim == 2
                and any(n.startswith(layer) for layer in layers)}  # fmt: skip
    assert {n for n in changed if n.startswith("vision_encoder.")} == matrices
    base, _ = load_model(start_dir)
    adapter = Path(config.out_dir) / "checkpoint/adapter"
    theirs = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    assert all(torch.allclose(theirs.state_dict()[n], after[n], atol=1e-6) for n in matrices)


def test_going_on_starts_where_the_merged_model_stands(configure):
    first = configure("first", trainable=("llm",), lr_connector=None)
    train.train(first)
    on = configure("on", trainable=("llm",), lr_connector=None, num_steps=1,
                   adapter_dir=str(Path(first.out_dir) / "checkpoint/adapter"))  # fmt: skip
    merged = configure("merged", model_dir=str(Path(first.out_dir) / "checkpoint"), num_steps=1)
    untrained = configure("untrained", num_steps=1)
    for config in (on, merged, untrained):
        train.train(config)
    assert first_loss(on) == pytest.approx(first_loss(merged), rel=1e-5)
    assert abs(first_loss(on) - first_loss(untrained)) > 1e-4


def test_zero_3_gives_the_same_adapters(configure):
    plain, sharded = configure("a"), configure("b", zero_config="params/deepspeed_zero3.json")
    for config in (plain, sharded):
        train.train(config)
    a, b = (load_file(Path(c.out_dir) / "checkpoint/adapter/adapter_model.safetensors") for c in
            (plain, sharded))  # fmt: skip
    assert set(a) == set(b) and all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_adapters_on_few_bits_end_in_a_plain_model(form, configure, start_dir):
    pytest.importorskip("bitsandbytes", reason="an extra: pip install bitsandbytes==0.50.2")
    config = configure("out", quantize=form)
    train.train(config)
    before, after = weights(start_dir), weights(Path(config.out_dir) / "checkpoint")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()}  # fmt: skip
    base, _ = load_model(start_dir)
    adapter = Path(config.out_dir) / "checkpoint/adapter"
    theirs = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    matrices = [n for n in before if n.startswith("language_model.") and "_proj.weight" in n]
    assert all(torch.allclose(theirs[n], after[n], atol=1e-6) for n in matrices)
    assert not any(torch.equal(before[n], after[n]) for n in matrices)
    plain = configure("plain")
    train.train(plain)  # the same start, but for the bits
    assert 1e-6 < abs(first_loss(config) - first_loss(plain)) < 0.2


def test_few_bits_without_bitsandbytes_or_with_zero_3_are_refused(configure, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes: pip install bitsandbytes=="):
        train.check_inputs(configure("out", quantize="nf4"))  # before any clip is encoded
    with pytest.raises(ConfigError, match="zero3.json shares out every matrix; take ZeRO 0 to 2"):
        train.train(configure("b", quantize="nf4", zero_config="params/deepspeed_zero3.json"))


def test_targets_are_the_matrices_of_the_layers(tiny):
    names = target_names(tiny[0], ("llm",))
    assert len(names) == 2 * 7 and not any("lm_head" in n for n in names)
    assert set(target_names(tiny[0], ("connector",))) == {
        f"connector.{name}" for name in (
            "linear", *(f"layers.0.{part}" for part in ("0.to_q", "0.to_kv", "0.to_out", "1.1",
                                                        "1.3")))}  # fmt: skip
    assert len(target_names(tiny[0], ("vision",))) == 2 * 6  # the third layer is not seen


QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj "
GATED = QKV + "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
FUSED = "{0}.query_key_value {0}.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
LLMS = {  # kind: where its layers are, the matrices of each
    **dict.fromkeys(("llama", "qwen2", "stablelm", "gemma"), ("model.layers", GATED)),
    "phi": ("model.layers", QKV + "self_attn.dense mlp.fc1 mlp.fc2"),
    "openelm": ("transformer.layers", "attn.qkv_proj attn.out_proj ffn.proj_1 ffn.proj_2"),
    "gpt_neox": ("gpt_neox.layers", FUSED.format("attention")),
    "falcon": ("transformer.h", FUSED.format("self_attention")),
    "bloom": ("transformer.h", FUSED.format("self_attention")),
    "gptj": ("transformer.h", "attn.q_proj attn.k_proj attn.v_proj attn.out_proj mlp.fc_in "
             "mlp.fc_out"),
    "mpt": ("transformer.blocks", "attn.Wqkv attn.out_proj ffn.up_proj ffn.down_proj"),
}  # fmt: skip
FIELDS = {"gemma": dict(head_dim=8), "gptj": dict(rotary_dim=4),
          "openelm": dict(head_dim=8, num_gqa_groups=2, ffn_dim_divisor=16)}  # fmt: skip


def with_llm(model, kind):
    """The model with a random LLM of another kind: width 32, 2 layers."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2,
                 bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes, **FIELDS.get(kind, {}))
    model.language_model = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.mark.parametrize("kind", LLMS)
def test_targets_of_every_llm_are_its_matrices_but_the_head(kind, tiny):
    layers, matrices = LLMS[kind]
    assert set(target_names(with_llm(tiny[0], kind), ("llm",))) == {
        f"language_model.{layers}.{n}.{name}" for n in (0, 1) for name in matrices.split()}


@pytest.mark.parametrize("kind", ["gptj", "falcon"])
@torch.no_grad()
def test_adapters_of_other_llms_are_merged(kind, tiny):
    model, ids = with_llm(tiny[0], kind), torch.tensor([[5, 6, 7, 8]])
    names, before = set(model.state_dict()), model(ids).logits
    add_adapters(model, ("llm",), rank=4, alpha=8, dropout=0.0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(std=0.2)
    adapted, merged = model(ids).logits, merge(model.state_dict(), model.adapter_settings)
    plain = with_llm(model, kind)
    plain.load_state_dict(merged)
    assert set(merged) == names and (adapted - before).abs().max() > 0.01
    assert torch.allclose(plain(ids).logits, adapted, atol=1e-5)


def test_an_llm_with_matrices_of_another_class_is_refused(tiny):
    """GPT-2's are Conv1D, stored the other way round."""
    model = with_llm(tiny[0], "gpt2")
    with pytest.raises(ValueError, match="lora names 'llm', but a GPT2LMHeadModel has no nn.Linear "
                       "for adapters; take it out of lora"):
        add_adapters(model, ("connector", "llm"), rank=4, alpha=8, dropout=0.0)


def test_another_models_adapter_is_refused(tiny, tmp_path):
    options = dict(rank=4, alpha=8, dropout=0.0, adapter_dir=tmp_path)
    with pytest.raises(ModelFolderError, match="no adapter_model.safetensors in it"):
        add_adapters(tiny[0], ("llm",), **options)


def test_an_adapter_of_another_rank_is_refused(tiny, tmp_path):
    name = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(2, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelFolderError, match="not this model's adapter; 28 of its weights diff"):
        add_adapters(tiny[0], ("llm",), rank=4, alpha=8, dropout=0.0, adapter_dir=tmp_path)


def test_an_adapter_of_another_alpha_is_refused(build_tiny, tmp_path):
    first, again = build_tiny()[0], build_tiny()[0]
    options = dict(rank=4, dropout=0.0)
    add_adapters(first, ("llm",), alpha=8.0, **options)
    save_adapter(first.state_dict(), first.adapter_settings, tmp_path / "adapter")
    options["adapter_dir"] = tmp_path / "adapter"
    with pytest.raises(ModelFolderError, match="adapter_config.json: .* with lora_alpha = 8.0, and "
                       "lora_alpha = 16.0 would rescale it; set lora_alpha to 8.0"):
        add_adapters(again, ("llm",), alpha=16.0, **options)
    again = build_tiny()[0]
    add_adapters(again, ("llm",), alpha=8, **options)
    saved, own = (adapter_weights(model.state_dict()) for model in (first, again))
    assert all(torch.equal(saved[name], own[name]) for name in saved)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(trainable=("connector",), lr_llm=None), "lora names 'llm', which trainable does not"),
        (dict(lora=(), adapter_dir="x"), "adapter_dir = 'x' needs lora"),
        (dict(lora=(), quantize="nf4"), "quantize = 'nf4' needs lora"),
        (dict(lora_rank=0), "lora_rank = 0 must be > 0"),
        (dict(vision_from=0.5), "vision_from = 0.5 but trainable does not name 'vision'"),
        (dict(vision_from=0.5, trainable=("llm", "vision"), lora=("vision",), lr_vision=1e-3,
              lr_connector=None), "vision_from = 0.5 says nothing where lora names 'vision'"),
    ],
)
def test_settings_that_contradict_each_other(changes, message, configure):
    with pytest.raises(ConfigError, match=message):
        configure("out", **changes)
