"""Published checkpoints: every layout, from names typed out from the published lists."""

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_tokenizer import make_tokenizer, write_sentencepiece, write_slow
from transformers import AutoConfig, AutoTokenizer

from tlv.builders import load_model
from tlv.convert import convert, main, make_image_processor, unseen_names
from tlv.designs import ENCODERS, count_parameters, count_tokens, paper_config
from tlv.model import TlvForConditionalGeneration
from tlv.pretrained import ModelFolderError
from tlv.processor import TlvProcessor
from tlv.published import LEGACY_LLMS, PARTS, rename
from tlv.published_config import read_vision_config, translate_config
from tlv.templates import render
from tlv.vision import picture_size

D, D_V, V, HIDDEN = 32, 24, 320, 48  # widths of LLM and encoder, vocabulary, encoder's MLP
LLM_LAYERS, VISION_LAYERS = 2, 3
TEXT = {
    "_name_or_path": "Qwen/Qwen2.5-3B", "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": D, "intermediate_size": 64, "model_type": "qwen2", "num_attention_heads": 4,
    "num_hidden_layers": LLM_LAYERS, "num_key_value_heads": 2, "rope_theta": 1000000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_mrope": False, "vocab_size": V,
}  # fmt: skip
VISION = {
    "hidden_act": "gelu_pytorch_tanh", "hidden_size": D_V, "image_size": 16,
    "intermediate_size": HIDDEN, "model_name_or_path": "google/siglip-so400m-patch14-384",
    "model_name_or_path2": "", "model_type": "siglip_vision_model", "num_attention_heads": 2,
    "num_hidden_layers": VISION_LAYERS, "patch_size": 4,
}  # fmt: skip
CONFIG = {
    "architectures": ["TinyLlavaForConditionalGeneration"], "connector_type": "groupresampler",
    "group": 4, "hidden_size": D, "image_aspect_ratio": "square", "image_token_index": -200,
    "llm_model_name_or_path": "Qwen/Qwen2.5-3B", "model_type": "tinyllava", "num_queries": 8,
    "num_resampler_layers": 1, "pad_token": "<|endoftext|>", "resampler_hidden_size": 768,
    "text_config": TEXT, "tokenizer_model_max_length": 3072, "tokenizer_padding_side": "right",
    "vision_config": VISION, "vision_feature_layer": -2,
    "vision_feature_select_strategy": "patch", "vision_hidden_size": D_V,
    "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
    "vision_model_name_or_path2": "", "vocab_size": V,
}  # fmt: skip


def llm_shapes():
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(LLM_LAYERS):
        layer = f"model.layers.{i}."
        for name, rows in (("q", D), ("k", D // 2), ("v", D // 2)):
            shapes[layer + f"self_attn.{name}_proj.weight"] = (rows, D)
            shapes[layer + f"self_attn.{name}_proj.bias"] = (rows,)
        shapes[layer + "self_attn.o_proj.weight"] = (D, D)
        shapes |= {layer + f"mlp.{n}_proj.weight": (64, D) for n in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (D, 64)
        shapes |= {layer + f"{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    return shapes


def vision_shapes(width=D_V):
    shapes = {"embeddings.patch_embedding.weight": (width, 3, 4, 4),
              "embeddings.patch_embedding.bias": (width,),
              "embeddings.position_embedding.weight": (16, width)}  # fmt: skip
    for i in range(VISION_LAYERS):
        layer = f"encoder.layers.{i}."
        for name in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj",
                     "self_attn.out_proj"):  # fmt: skip
            shapes |= {f"{layer}{name}.weight": (width, width), f"{layer}{name}.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (width,), f"{layer}{name}.bias": (width,)}
        shapes |= {layer + "mlp.fc1.weight": (HIDDEN, width), layer + "mlp.fc1.bias": (HIDDEN,),
                   layer + "mlp.fc2.weight": (width, HIDDEN), layer + "mlp.fc2.bias": (width,)}
    shapes |= {"post_layernorm.weight": (width,), "post_layernorm.bias": (width,),
               "head.probe": (1, 1, width), "head.attention.in_proj_weight": (3 * width, width),
               "head.attention.in_proj_bias": (3 * width,),
               "head.attention.out_proj.weight": (width, width),
               "head.attention.out_proj.bias": (width,), "head.layernorm.weight": (width,),
               "head.layernorm.bias": (width,), "head.mlp.fc1.weight": (HIDDEN, width),
               "head.mlp.fc1.bias": (HIDDEN,), "head.mlp.fc2.weight": (width, HIDDEN),
               "head.mlp.fc2.bias": (width,)}  # fmt: skip
    return {"vision_model." + name: shape for name, shape in shapes.items()}


def resampler_shapes(num_latents, num_layers=1):
    layer = {"0.norm_media.weight": (D,), "0.norm_media.bias": (D,), "0.norm_latents.weight": (D,),
             "0.norm_latents.bias": (D,), "0.to_q.weight": (512, D), "0.to_kv.weight": (1024, D),
             "0.to_out.weight": (D, 512), "1.0.weight": (D,), "1.0.bias": (D,),
             "1.1.weight": (4 * D, D), "1.3.weight": (D, 4 * D)}  # fmt: skip
    shapes = {"latents": (num_latents, D), "linear.weight": (D, D_V), "linear.bias": (D,),
              "norm.weight": (D,), "norm.bias": (D,)}  # fmt: skip
    return shapes | {f"layers.{i}.{name}": shape
                     for i in range(num_layers) for name, shape in layer.items()}  # fmt: skip


MLP = {"0.weight": (D, D_V), "0.bias": (D,), "2.weight": (D, D), "2.bias": (D,)}
PREFIXES = ("language_model.", "vision_tower._vision_tower.", "connector._connector.")


def make_weights(connector=None, llm=None, vision=None, dtype=torch.float32):
    """Random tensors under published names; parts by their shapes, else Qwen2's and SigLIP's."""
    generator = torch.Generator().manual_seed(0)
    connector = resampler_shapes(2) if connector is None else connector
    parts = llm or llm_shapes(), vision or vision_shapes(), connector
    return {
        prefix + name: (torch.randn(shape, generator=generator) * 0.2).to(dtype)
        for prefix, shapes in zip(PREFIXES, parts, strict=True) for name, shape in shapes.items()
    }  # fmt: skip


@pytest.fixture
def write(tmp_path, tokenizer):
    """write(weights, **changes of config) -> a flat published folder."""

    def build(weights, name="published", write_tokenizer=tokenizer.save_pretrained, **changes):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        if weights is not None:
            save_file(weights, folder / "model.safetensors")
        write_tokenizer(folder)
        return folder

    return build


def show(out, clip_frames):
    """Logits of one prompt about one clip."""
    model, processor = load_model(out)
    prompt = render([("<video>\nWhat is he doing?", None)], model.config.template)
    clip = clip_frames(1 if model.config.num_frames == 1 else 4)
    with torch.no_grad():
        return model(**processor(text=[prompt], videos=[clip])).logits


def test_a_flat_video_checkpoint_and_what_it_carries_over(write, tmp_path, clip_frames):
    weights = make_weights()
    config = convert(write(weights), tmp_path / "out")
    model, processor = load_model(tmp_path / "out")
    assert config.connector_type == "group_resampler" and len(model.connector.latents) == 2
    assert (config.num_groups, config.num_queries, config.num_frames) == (4, 8, 16)
    assert (config.template, config.vision_feature_layer, config.max_seq_len) == (
        "qwen2_base", -2, 3072)  # fmt: skip
    assert config.drop_first_patch and config.image_mode == "square"
    assert processor.num_frames == 16 and processor.num_tokens(16) == 8
    state = model.state_dict()
    ours = {rename(name): tensor for name, tensor in weights.items()}
    assert set(state) - set(ours) == {"language_model.lm_head.weight"}
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.items())
    head = model.language_model.get_output_embeddings().weight
    assert head is model.language_model.get_input_embeddings().weight
    assert model.vision_features(torch.zeros(1, 3, 16, 16)).shape == (1, 15, D_V)  # of 16
    assert show(tmp_path / "out", clip_frames).isfinite().all()


def test_every_value_of_a_config_is_carried_over(write, tmp_path):
    """None is what TlvConfig or transformers would take by itself."""
    weights = make_weights(resampler_shapes(2, num_layers=2))
    source = write(
        weights, num_queries=6, group=3, num_resampler_layers=2, vision_feature_layer=-3,
        vision_feature_select_strategy="cls_patch", tokenizer_model_max_length=777,
        image_aspect_ratio="pad",
        text_config=TEXT | {"rms_norm_eps": 0.01, "rope_theta": 5000.0, "hidden_act": "gelu"},
        vision_config=VISION | {"layer_norm_eps": 0.02, "hidden_act": "relu"},
    )  # fmt: skip
    convert(source, tmp_path / "out")
    model, processor = load_model(tmp_path / "out")
    config, text, vision = model.config, model.config.text_config, model.config.vision_config
    assert config.num_queries == 6 and config.num_groups == 3
    assert config.num_resampler_layers == 2
    assert config.vision_feature_layer == -3
    assert config.drop_first_patch is False
    assert config.image_mode == processor.image_mode == "pad"
    assert config.max_seq_len == 777 and config.long_rows == "cut"
    assert (text.rms_norm_eps, text.hidden_act) == (0.01, "gelu")
    assert text.rope_parameters["rope_theta"] == 5000.0
    assert (vision.layer_norm_eps, vision.hidden_act) == (0.02, "relu")
    assert processor.num_tokens(16) == 6


def test_a_folders_name_and_the_names_in_its_config_decide_nothing(write, tmp_path):
    """Published code looks for phi, clip, lora and finetune in them."""
    weights, name = make_weights(), "phi-lora-finetune-clip"
    convert(write(weights), tmp_path / "a")
    source = write(weights, name, **dict.fromkeys(
        ("llm_model_name_or_path", "vision_model_name_or_path", "tokenizer_name_or_path"), name))
    convert(source, tmp_path / "b")
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in "ab")
    assert a == b and {"config.json", "model.safetensors", "tokenizer.json"} < set(a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_stay_as_they_are(dtype, write, tmp_path):
    weights = {n: t for n, t in make_weights(dtype=dtype).items() if ".head." not in n}
    convert(write(weights), tmp_path / "out")
    told = json.loads((tmp_path / "out/config.json").read_text())["dtype"]
    assert told == str(dtype).removeprefix("torch.")
    saved = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}  # the head's zeros too
    state = load_model(tmp_path / "out", dtype)[0].state_dict()
    assert all(torch.equal(state[rename(name)], tensor) for name, tensor in weights.items())


def test_the_config_of_the_model_that_reasons(write, tmp_path):
    """TinyLLaVA-Video-R1: transformers wrote no window and no pad_token_id."""
    assert "pad_token_id" not in CONFIG
    source = write(make_weights(), text_config=TEXT | {"sliding_window": None},
                   _name_or_path="Zhang199/TinyLLaVA-Video-Coldstart_NextQA_16")  # fmt: skip
    config = convert(source, tmp_path / "out")
    model, processor = load_model(tmp_path / "out")
    assert config.text_config.sliding_window is None
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id is not None


@pytest.mark.parametrize("name", ["naiveresampler", "resamplerwithpe"])
def test_both_names_of_the_naive_resampler(name, write, tmp_path):
    source = write(make_weights(resampler_shapes(8)), connector_type=name, group=None)
    assert convert(source, tmp_path / "out").connector_type == "naive_resampler"
    assert len(load_model(tmp_path / "out")[0].connector.latents) == 8


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_and_pickles_of_tensors_give_the_same_model(form, write, tmp_path, clip_frames):
    weights = make_weights()
    convert(write(weights), tmp_path / "whole")
    source = write(None, "sharded")
    stem, names = ("model" if form == "safetensors" else "pytorch_model"), sorted(weights)
    half, index = len(names) // 2, {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"{stem}-0000{number}-of-00002.{form}"
        chosen = {name: weights[name] for name in part}
        save = save_file if form == "safetensors" else torch.save
        save(chosen, source / file)
        index |= dict.fromkeys(part, file)
    (source / f"{stem}.{form}.index.json").write_text(json.dumps({"weight_map": index}))
    convert(source, tmp_path / "out")
    a, b = (show(tmp_path / name, clip_frames) for name in ("whole", "out"))
    assert torch.equal(a, b)
    (source / f"{stem}-00002-of-00002.{form}").unlink()
    with pytest.raises(ModelFolderError, match="00002-of-00002.* is not there; the copy is unf"):
        convert(source, tmp_path / "again")


def test_a_pickle_of_code_is_not_run(write, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("x",))

    source = write(None)
    torch.save({"language_model.model.norm.weight": Trap()}, source / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="pytorch_model.bin: not readable as tensors"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_known", [True, False])
def test_code_in_a_published_folder_is_not_run(is_known, write, tmp_path, monkeypatch):
    """TinyLLaVA Factory's folders hold configuration.py and modeling_tinyllava_*.py."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    auto_map = {"AutoConfig": "configuration.TinyLlavaConfig", "AutoModel": "modeling.TinyLlava",
                "AutoModelForCausalLM": "modeling.TinyLlava"}  # fmt: skip
    vision = VISION | {"auto_map": auto_map} | ({} if is_known else {"model_type": "trap"})
    source = write(make_weights(), auto_map=auto_map, text_config=TEXT | {"auto_map": auto_map},
                   vision_config=vision)  # fmt: skip
    for name in ("configuration.py", "modeling.py"):
        (source / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    if is_known:
        convert(source, tmp_path / "out")
        load_model(tmp_path / "out")
        assert "auto_map" not in (tmp_path / "out/config.json").read_text()
    else:
        with pytest.raises(ModelFolderError, match="published: vision_config .*'trap'"):
            convert(source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_code_of_a_published_tokenizer_is_not_run(write, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    source = write(make_weights())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": ["trap.Trap", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelFolderError, match="published: .*code from a model folder is not run"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


MATRIX = re.compile(r"(layers\.\d+\..*(_proj|fc\d)|_connector\.\d)(?=\.(weight|bias)$)")


def write_parts(folder, weights, adapted=()):
    """The three folders of a pretraining run; of the `adapted` ones the matrices are named as LoRA
    output names them."""
    for part, prefix in (("language_model", "language_model."),
                         ("vision_tower", "vision_tower._vision_tower."),
                         ("connector", "connector.")):  # fmt: skip
        (folder / part).mkdir()
        chosen = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        if part in adapted:
            chosen = {MATRIX.sub(r"\1.base_layer", n): t for n, t in chosen.items()}
        torch.save(chosen, folder / part / "pytorch_model.bin")


@pytest.mark.parametrize("published, connector, num_frames, tokens", [
    ("mlp2x_gelu", "mlp2x_gelu", 1, 15), ("mof_mlp", "mof_mlp", 1, 32),
    ("groupresampler", "group_resampler", 16, 8),  # TinyLLaVA-Video's stage 1
])  # fmt: skip
def test_a_checkpoint_in_three_folders(
        published, connector, num_frames, tokens, write, write_mof, tmp_path, clip_frames):
    changes, options = dict(connector_type=published), {}
    weights = make_weights(None if published == "groupresampler" else MLP)
    if published == "mof_mlp":
        weights, changes, options["second_vision_dir"] = write_mof()
    flat, parts = (write(w, name, **changes) for w, name in ((weights, "flat"), (None, "parts")))
    write_parts(parts, weights)
    for name, source in (("a", flat), ("b", parts)):
        config = convert(source, tmp_path / name, **options)
        assert (config.num_frames, config.connector_type) == (num_frames, connector)
    assert torch.equal(show(tmp_path / "a", clip_frames), show(tmp_path / "b", clip_frames))
    assert load_model(tmp_path / "b")[1].num_tokens(1) == tokens


LLM_Q = "language_model.model.layers.1.self_attn.q_proj"
VISION_Q = "vision_tower._vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
VISION_FC = "vision_tower._vision_tower.vision_model.encoder.layers.1.mlp.fc1"


@pytest.mark.parametrize("matrices, is_tied, dtype", [
    ([LLM_Q], True, torch.float32), ([LLM_Q], False, torch.float32),
    ([LLM_Q], True, torch.bfloat16), ([VISION_Q, VISION_FC], True, torch.float32),
    (["connector._connector.0", "connector._connector.2"], True, torch.float32),
    ([LLM_Q, VISION_Q, "connector._connector.0"], True, torch.float32),
])  # fmt: skip
def test_lora_output_is_merged(matrices, is_tied, dtype, write, tmp_path):
    weights = make_weights(MLP, dtype=dtype)
    if not is_tied:
        weights["language_model.lm_head.weight"] = torch.randn(V, D)
    source = write(None, connector_type="mlp2x_gelu",
                   text_config=TEXT | {"tie_word_embeddings": is_tied})  # fmt: skip
    write_parts(source, weights, {name.split(".")[0] for name in matrices})
    adapter, wanted = {}, dict(weights)
    for name in matrices:
        rows, columns = weights[f"{name}.weight"].shape
        a, b = torch.randn(2, columns).to(dtype), torch.randn(rows, 2).to(dtype)
        adapter |= {f"base_model.model.{name}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
        merged = weights[f"{name}.weight"].float() + 4 * b.float() @ a.float()
        wanted[f"{name}.weight"] = merged.to(dtype)  # rounded once, at the end
    save_file(adapter, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    convert(source, tmp_path / "out")
    state = load_model(tmp_path / "out", dtype)[0].state_dict()
    for name, tensor in wanted.items():
        atol = 1e-5 if name.removesuffix(".weight") in matrices else 0
        assert torch.allclose(state[rename(name)], tensor, rtol=0, atol=atol), name


Q = "base_model.model.language_model.model.layers.1.self_attn.q_proj"
PAIR = {f"{Q}.lora_A.weight": torch.ones(2, D), f"{Q}.lora_B.weight": torch.ones(D, 2)}
HEAD = "base_model.model.language_model.lm_head"


@pytest.mark.parametrize(
    "adapter, settings, message",
    [
        (PAIR | {f"{HEAD}.weight": torch.ones(V, D)}, {}, "holds .*lm_head.weight, which is no Lo"),
        (PAIR | {f"{Q}.lora_magnitude_vector": torch.ones(D)}, {}, "lora_magnitude_vector, which"),
        (PAIR | {f"{Q}.lora_embedding_A": torch.ones(2, D)}, {}, "lora_embedding_A, which is no L"),
        ({f"{Q}.lora_A.weight": torch.ones(2, D)}, {}, "q_proj.lora_A.weight but not .*lora_B.wei"),
        ({f"{Q}.lora_B.weight": torch.ones(D, 2)}, {}, "q_proj.lora_B.weight but not .*lora_A.wei"),
        ({k.replace("q_proj", "x"): t for k, t in PAIR.items()}, {}, "attn.x.weight has no matrix"),
        (PAIR | {f"{Q}.lora_B.weight": torch.ones(V, 2)}, {}, r"is \(320, 32\) and its matrix"),
        (PAIR, {"use_dora": True}, "asks for use_dora; plain LoRA"),
        (PAIR, {"alpha_pattern": {"q_proj": 4}}, "asks for alpha_pattern; plain LoRA"),
        (PAIR, {"r": None}, "lacks r or lora_alpha"),
        (PAIR, {"lora_alpha": None}, "lacks r or lora_alpha"),
    ],
)
def test_all_of_an_adapter_is_used_or_none(adapter, settings, message, write, tmp_path):
    source = write(None, connector_type="mlp2x_gelu")
    write_parts(source, make_weights(MLP), ["language_model"])
    save_file(adapter, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8} | settings))
    with pytest.raises(ModelFolderError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, shapes, ours, tokens",
    [
        ("identity", {}, "connector.", 15),
        ("linear", {"weight": (D, D_V), "bias": (D,)}, "connector.layers.0.", 15),
        ("mlp1x_gelu", {n: MLP[n] for n in ("0.weight", "0.bias")}, "connector.layers.", 15),
        ("mlp3x_gelu", MLP | {"4.weight": (D, D), "4.bias": (D,)}, "connector.layers.", 15),
        ("resampler", resampler_shapes(8), "connector.", 8),
    ],
)
def test_other_connectors_of_image_models(name, shapes, ours, tokens, write, tmp_path, clip_frames):
    width = D if name == "identity" else D_V  # which maps nothing
    weights = make_weights(shapes, vision=vision_shapes(width))
    source = write(weights, connector_type=name, group=None,
                   vision_config=VISION | {"hidden_size": width})  # fmt: skip
    config = convert(source, tmp_path / "out")
    assert (config.connector_type, config.num_frames) == (name, 1)
    model, processor = load_model(tmp_path / "out")
    assert processor.num_tokens(1) == tokens
    state = model.state_dict()
    assert {n for n in state if n.startswith("connector.")} == {ours + n for n in shapes}
    assert all(torch.equal(state[ours + n], weights[PREFIXES[2] + n]) for n in shapes)
    assert show(tmp_path / "out", clip_frames).isfinite().all()


def clip_shapes():
    """CLIP's names: a class token, and a norm before the layers (spelt so)."""
    shapes = {n: s for n, s in vision_shapes().items() if ".head." not in n}
    del shapes["vision_model.embeddings.patch_embedding.bias"]
    shapes |= {"vision_model.embeddings.class_embedding": (D_V,),
               "vision_model.embeddings.position_embedding.weight": (17, D_V),
               "vision_model.pre_layrnorm.weight": (D_V,),
               "vision_model.pre_layrnorm.bias": (D_V,)}  # fmt: skip
    return shapes


def dino_shapes():
    """DINOv2's names, as transformers 4 had them."""
    shapes = {"embeddings.cls_token": (1, 1, D_V), "embeddings.mask_token": (1, D_V),
              "embeddings.position_embeddings": (1, 17, D_V),
              "embeddings.patch_embeddings.projection.weight": (D_V, 3, 4, 4),
              "embeddings.patch_embeddings.projection.bias": (D_V,)}  # fmt: skip
    for i in range(VISION_LAYERS):
        layer = f"encoder.layer.{i}."
        sizes = {"norm1": (D_V,), "norm2": (D_V,), "mlp.fc1": (4 * D_V, D_V),
                 "mlp.fc2": (D_V, 4 * D_V), "attention.output.dense": (D_V, D_V)}  # fmt: skip
        sizes |= {f"attention.attention.{n}": (D_V, D_V) for n in ("query", "key", "value")}
        for name, size in sizes.items():
            shapes |= {f"{layer}{name}.weight": size, f"{layer}{name}.bias": size[:1]}
        shapes |= {f"{layer}layer_scale{n}.lambda1": (D_V,) for n in (1, 2)}
    return shapes | {"layernorm.weight": (D_V,), "layernorm.bias": (D_V,)}


CLIP = VISION | {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
DINO = {"model_type": "dinov2", "hidden_size": D_V, "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4}  # fmt: skip


def both(names, prefix=""):
    return {f"{prefix}{name}.{kind}" for name in names.split() for kind in ("weight", "bias")}


UNSEEN_CLIP = both("post_layernorm") | both(
    "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj layer_norm1 layer_norm2 "
    "mlp.fc1 mlp.fc2", "encoder.layers.2.")  # fmt: skip
UNSEEN_SIGLIP = UNSEEN_CLIP | both("attention.out_proj layernorm mlp.fc1 mlp.fc2", "head.") | {
    "head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias"}  # fmt: skip
UNSEEN_DINO = both("layernorm") | both(
    "attention.q_proj attention.k_proj attention.v_proj attention.o_proj norm1 norm2 mlp.fc1 "
    "mlp.fc2", "encoder.layer.2.") | {
    "encoder.layer.2.layer_scale1.lambda1", "encoder.layer.2.layer_scale2.lambda1",
    "embeddings.mask_token"}  # fmt: skip


@pytest.mark.parametrize(
    "fields, shapes, unseen, tokens, mode",
    [
        (VISION, vision_shapes(), UNSEEN_SIGLIP, 15, "square"),
        (CLIP, clip_shapes(), UNSEEN_CLIP, 16, "crop"),  # its class token is dropped
        (DINO, dino_shapes(), UNSEEN_DINO, 16, "crop"),
    ],
    ids=["siglip", "clip", "dinov2"],
)
def test_what_may_be_missing_of_an_encoder_is_what_the_output_never_sees(
        fields, shapes, unseen, tokens, mode, write, tmp_path, clip_frames):  # fmt: skip
    weights = make_weights(MLP, vision=shapes)
    changes = dict(connector_type="mlp2x_gelu", vision_config=fields)
    config = convert(write(weights, "all", **changes), tmp_path / "a")
    assert config.drop_first_patch and config.image_mode == mode
    model, processor = load_model(tmp_path / "a")
    assert processor.num_tokens(1) == tokens
    unseen, pattern = {"vision_encoder." + name for name in unseen}, unseen_names(config)
    assert {name for name in model.state_dict() if pattern.match(name)} == unseen
    kept = {name: tensor for name, tensor in weights.items() if rename(name) not in unseen}
    assert len(kept) == len(weights) - len(unseen)
    convert(write(kept, "few", **changes), tmp_path / "b")
    assert torch.equal(show(tmp_path / "a", clip_frames), show(tmp_path / "b", clip_frames))


@pytest.fixture
def write_mof(tmp_path):
    """write_mof() -> weights of TinyLLaVA Factory's `mof`, its changes of CONFIG, and the folder
    of DINOv2's config, which is not among them."""

    def build():
        parts = {"vision_tower._vision_tower.clip.": clip_shapes(),
                 "vision_tower._vision_tower.dinov2.": dino_shapes(),
                 "connector._connector.clip.": MLP, "connector._connector.dinov2.": MLP,
                 "language_model.": llm_shapes()}  # fmt: skip
        weights = {prefix + n: torch.randn(s) * 0.2
                   for prefix, shapes in parts.items() for n, s in shapes.items()}  # fmt: skip
        (tmp_path / "dino").mkdir()
        (tmp_path / "dino/config.json").write_text(json.dumps(DINO))
        changes = dict(connector_type="mof_mlp", vision_config=CLIP,
                       vision_model_name_or_path2="mof:facebook/dinov2-large")  # fmt: skip
        return weights, changes, tmp_path / "dino"

    return build


def test_a_mixture_of_clip_and_dinov2(write, write_mof, tmp_path, clip_frames):
    """Two encoders, two MLPs, and no config of the second encoder."""
    weights, changes, dino_dir = write_mof()
    source = write(weights, **changes)
    with pytest.raises(ModelFolderError, match="mixture with 'mof:facebook/dinov2-large', whose"):
        convert(source, tmp_path / "out")
    config = convert(source, tmp_path / "out", second_vision_dir=dino_dir)
    assert config.connector_type == "mof_mlp" and config.drop_first_patch
    assert config.image_mode == "crop"  # CLIP's processor
    model, processor = load_model(tmp_path / "out")
    assert processor.num_tokens(1) == 32  # 16 patches, twice
    state = model.state_dict()
    layer = "encoder.layer.1.attention."
    for old, new in (("attention.query", "q_proj"), ("attention.key", "k_proj"),
                     ("attention.value", "v_proj"), ("output.dense", "o_proj")):  # fmt: skip
        theirs = weights[f"vision_tower._vision_tower.dinov2.{layer}{old}.weight"]
        assert torch.equal(state[f"vision_encoder.encoders.1.{layer}{new}.weight"], theirs)
    assert torch.equal(state["connector.mlps.1.2.weight"],
                       weights["connector._connector.dinov2.2.weight"])
    assert show(tmp_path / "out", clip_frames).isfinite().all()


def decoder_shapes(attention, mlp, norms, bias):
    """Names of a legacy LLM of one layer: its matrices, norms and which of both have a bias."""
    shapes = {"embed_tokens.weight": (V, D)}
    sizes = {f"layers.0.self_attn.{name}": (D, D) for name in attention}
    sizes |= {f"layers.0.mlp.{n}": (D, 64) if n in ("fc2", "down_proj") else (64, D) for n in mlp}
    sizes |= dict.fromkeys(norms, (D,))
    for name, size in sizes.items():
        shapes[f"{name}.weight"] = size
        if any(part in name for part in bias):
            shapes[f"{name}.bias"] = size[:1]
    return {f"model.{name}": size for name, size in shapes.items()} | {"lm_head.weight": (V, D)}


LLAMA_NAMES = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"),
)
LLMS = {  # type: names, fields of its config, template
    "llama": (
        decoder_shapes(*LLAMA_NAMES, ()),
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, "llama"),
    "stablelm": (
        decoder_shapes(*LLAMA_NAMES, ("norm", "q_proj", "k_proj", "v_proj")),
        {"num_key_value_heads": 4, "use_qkv_bias": True, "partial_rotary_factor": 0.25}, "phi"),
    "phi": (
        decoder_shapes(("q_proj", "k_proj", "v_proj", "dense"), ("fc1", "fc2"),
                       ("final_layernorm", "layers.0.input_layernorm"), ("",))
        | {"lm_head.bias": (V,)}, {"partial_rotary_factor": 0.5}, "phi"),
    "gemma": (
        {n: s for n, s in decoder_shapes(*LLAMA_NAMES, ()).items() if n != "lm_head.weight"},
        {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}, "gemma"),
}  # fmt: skip


def flat(kind):
    """Weights of an image model with one of LLMS, and its changes of CONFIG."""
    shapes, fields, _ = LLMS[kind]
    text = {"model_type": kind, "hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "vocab_size": V, **fields}  # fmt: skip
    return make_weights(MLP, llm=shapes), dict(connector_type="mlp2x_gelu", text_config=text)


def write_byte_level(folder):
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    make_tokenizer(["A red circle."], special, True, V).save_pretrained(folder)


def write_gemma(folder):
    write_sentencepiece(folder, "Gemma")


def write_phi(folder):
    return write_slow(folder, "CodeGenTokenizer", ("<|endoftext|>",), ("\t\t", "  "))


def write_qwen2(folder):
    added = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return write_slow(folder, "Qwen2Tokenizer", added=added)


@pytest.mark.parametrize("kind, write_tokenizer", [
    ("llama", write_sentencepiece), ("stablelm", None), ("phi", write_phi), ("gemma", write_gemma),
])  # fmt: skip
def test_a_flat_checkpoint_of_another_llm(kind, write_tokenizer, write, tmp_path, clip_frames):
    weights, changes = flat(kind)
    if write_tokenizer:
        changes["write_tokenizer"] = write_tokenizer
    config = convert(write(weights, **changes), tmp_path / "out")
    assert (config.text_config.model_type, config.template) == (kind, LLMS[kind][2])
    assert config.tie_word_embeddings == (kind == "gemma")
    model, processor = load_model(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(state[n], weights[n]) for n in weights if "language_model" in n)
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]
    assert show(tmp_path / "out", clip_frames).isfinite().all()


@pytest.mark.parametrize(
    "kind, write_tokenizer, tokens",
    [
        ("qwen2", write_qwen2, "R u n n ing Ġ Ġ in <|endoftext|>".split()),
        ("phi", write_phi, [*"Runn", "ing", "  ", "in", "<|endoftext|>"]),  # two spaces are one
    ],
)
def test_a_slow_tokenizer_is_read(kind, write_tokenizer, tokens, write, tmp_path):
    """vocab.json, merges.txt and added_tokens.json, as TinyLLaVA-Video and Phi-2's have them."""
    weights, changes = (make_weights(), {}) if kind == "qwen2" else flat(kind)
    source = write(weights, write_tokenizer=write_tokenizer, **changes)
    assert not (source / "tokenizer.json").exists()
    ids = write_tokenizer(source)
    convert(source, tmp_path / "out")
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made("Running  in<|endoftext|>").input_ids == [ids[token] for token in tokens]
    assert made.pad_token == made.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("kind, write_tokenizer, bos, eos", [
    ("llama", write_sentencepiece, 1, 2), ("gemma", write_gemma, 2, 1),
])  # fmt: skip
def test_a_sentencepiece_model_is_read(kind, write_tokenizer, bos, eos, write, tmp_path):
    """tokenizer.model alone, as TinyLLaVA-OpenELM-450M-SigLIP's; transformers needs protobuf."""
    weights, changes = flat(kind)
    source = write(weights, write_tokenizer=write_tokenizer, **changes)
    assert not (source / "tokenizer.json").exists()
    convert(source, tmp_path / "out")
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    for text in ("A red circle moves.", "in a  park", "l'été 日本"):
        ids = made(text).input_ids
        assert ids == [bos, *theirs.encode(text)] and max(ids) < 300
        assert made.decode(ids, skip_special_tokens=True) == text
    assert made("a" + made.eos_token).input_ids[-1] == made.eos_token_id == eos


def test_an_instruct_tokenizer_leads_to_its_template(write, tmp_path):
    source = write(make_weights())
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(source)
    assert convert(source, tmp_path / "out").template == "qwen2_instruct"
    ends = load_model(tmp_path / "out")[0].generation_config.eos_token_id
    assert ends == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


# ---- TinyLLaVABench -------------------------------------------------------------------------

OLD_STABLELM = {"num_heads": 4, "num_key_value_heads": 4, "use_qkv_bias": True, "rope_pct": 0.5,
                "norm_eps": 1e-6}  # fmt: skip


@pytest.fixture
def write_legacy(write, tmp_path):
    """write_legacy(class) -> its folder, without the encoder's last layer; and its weights."""

    def build(kind, **options):
        shapes, fields, _ = LLMS[LEGACY_LLMS[kind]]
        is_old = LEGACY_LLMS[kind] == "stablelm"
        fields = OLD_STABLELM if is_old else {"num_attention_heads": 4, **fields}
        vision = {n: s for n, s in vision_shapes().items()
                  if "layers.2." not in n and "post_layernorm" not in n and "head" not in n}
        shapes = shapes | {"model.vision_tower.vision_tower." + n: s for n, s in vision.items()}
        shapes |= {"model.mm_projector." + n: s for n, s in MLP.items()}
        weights = {n: torch.randn(s) * 0.2 for n, s in shapes.items()}
        source = write(weights, **options)
        (source / "config.json").write_text(json.dumps({
            "architectures": [kind], "model_type": "tiny_llava", "hidden_size": D,
            "auto_map": {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"},
            "intermediate_size": 64, "num_hidden_layers": 1, **fields, "vocab_size": V,
            "tie_word_embeddings": False, "mm_vision_tower": "elsewhere/siglip",
            "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad",
            "tokenizer_model_max_length": 3072,
        }))  # fmt: skip
        (source / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        return source, weights

    return build


@pytest.fixture
def encoder_dir(tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text(json.dumps(VISION))
    return tmp_path / "encoder"


@pytest.mark.parametrize("kind", LEGACY_LLMS)
def test_a_legacy_checkpoint_without_its_last_encoder_layer(
        kind, write_legacy, encoder_dir, tmp_path, clip_frames):  # fmt: skip
    """729 tokens, Phi-2's head with a bias; block 26, final norm and head are not there."""
    shapes, _, template = LLMS[LEGACY_LLMS[kind]]
    options = dict(write_tokenizer=write_byte_level) if template == "llama" else {}
    source, weights = write_legacy(kind, **options)
    with pytest.raises(ModelFolderError, match="mm_vision_tower 'elsewhere/siglip' is unknown"):
        convert(source, tmp_path / "out")
    config = convert(source, tmp_path / "out", vision_dir=encoder_dir)
    model, processor = load_model(tmp_path / "out")
    assert (config.template, config.image_mode, config.drop_first_patch) == (template, "pad", False)
    text = config.text_config
    assert text.model_type == LEGACY_LLMS[kind] and text.num_attention_heads == 4
    if text.model_type == "stablelm":
        assert (text.rope_parameters["partial_rotary_factor"], text.layer_norm_eps) == (0.5, 1e-6)
    assert processor.num_tokens(1) == 16  # every patch
    state = model.state_dict()
    assert all(torch.equal(state[f"language_model.{n}"], weights[n]) for n in shapes)
    last = state["vision_encoder.encoder.layers.2.mlp.fc1.weight"]
    assert not last.any()  # zeros that nothing reads
    assert show(tmp_path / "out", clip_frames).isfinite().all()
    assert not (tmp_path / "ran").exists()


def test_stablelms_own_tokenizer_is_not_run_but_replaced(
        write_legacy, encoder_dir, tmp_path, tokenizer, monkeypatch):  # fmt: skip
    """TinyLLaVA-2.0B's is code: Arcade100kTokenizer, which reads arcade100k.tiktoken."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))

    def write_arcade(folder):
        settings = {"tokenizer_class": "Arcade100kTokenizer",
                    "auto_map": {"AutoTokenizer": ["trap.Arcade100kTokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "arcade100k.tiktoken").write_text("IQ== 0\n")

    source, _ = write_legacy("TinyLlavaStablelmForCausalLM", write_tokenizer=write_arcade)
    with pytest.raises(ModelFolderError, match="folder is not run; .*; give the .*tokenizer_dir"):
        convert(source, tmp_path / "out", vision_dir=encoder_dir)
    tokenizer.save_pretrained(tmp_path / "llm")
    config = convert(source, tmp_path / "out", vision_dir=encoder_dir,
                     tokenizer_dir=tmp_path / "llm")  # fmt: skip
    assert config.template == "phi" and not (tmp_path / "ran").exists()


SIGLIP_NAME, CLIP_NAME = "google/siglip-so400m-patch14-384", "openai/clip-vit-large-patch14-336"


@pytest.mark.parametrize(
    "name, encoder, drops",
    [
        ("bczhou/TinyLLaVA-1.5B-SigLIP", SIGLIP_NAME, False),
        ("bczhou/TinyLLaVA-2.0B-SigLIP", SIGLIP_NAME, False),
        ("bczhou/TinyLLaVA-3.1B-SigLIP", SIGLIP_NAME, False),
        (CLIP_NAME, CLIP_NAME, True),  # its class token
    ],
)
def test_a_legacy_config_names_its_encoder(name, encoder, drops, tokenizer):
    """Fields as TinyLLaVABench's code writes them (the published file itself was not at hand): the
    LLM's, its own, and those of training."""
    raw = {
        "_name_or_path": "bczhou/TinyLLaVA-3.1B", "architectures": ["TinyLlavaPhiForCausalLM"],
        "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration.TinyLlavaConfig"},
        "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256,
        "freeze_mm_mlp_adapter": False, "hidden_act": "gelu_new", "hidden_size": 2560,
        "image_aspect_ratio": "pad", "initializer_range": 0.02, "intermediate_size": 10240,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "mm_hidden_size": 1152,
        "mm_projector_lr": None, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": name, "model_type": "tiny_llava_phi",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pad_token": "<|endoftext|>", "pad_token_id": 50256, "partial_rotary_factor": 0.4,
        "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "tokenizer_model_max_length": 3072,
        "tokenizer_padding_side": "right", "torch_dtype": "float32",
        "transformers_version": "4.37.2", "tune_entire_model": True, "tune_mm_mlp_adapter": False,
        "tune_vision_tower": False, "tune_vit_from_layer": 12, "use_cache": True,
        "use_mm_proj": True, "vocab_size": 51200,
    }  # fmt: skip
    config = translate_config("published", raw, "legacy", tokenizer)
    for field, value in ENCODERS[encoder].items():
        assert getattr(config.vision_config, field) == value, field
    text = config.text_config
    assert (text.model_type, text.hidden_size, text.vocab_size) == ("phi", 2560, 51200)
    assert text.rope_parameters["partial_rotary_factor"] == 0.4
    assert (config.drop_first_patch, config.image_mode) == (drops, "pad")
    assert (config.connector_type, config.num_frames) == ("mlp2x_gelu", 1)
    assert (config.template, config.vision_feature_layer, config.max_seq_len) == ("phi", -2, 3072)
    assert "auto_map" not in config.to_json_string()


def test_a_flat_openelm_checkpoint(write, tmp_path, clip_frames):
    """TinyLLaVA-OpenELM-450M-SigLIP-0.89B: another language model's names, Llama's tokenizer."""
    text = {
        "activation_fn_name": "swish", "architectures": ["OpenELMForCausalLM"],
        "auto_map": {"AutoConfig": "apple/OpenELM-450M-Instruct--configuration_openelm.Config"},
        "ffn_dim_divisor": 16, "ffn_multipliers": [0.5, 4.0], "ffn_with_glu": True, "head_dim": 8,
        "max_context_length": 2048, "model_dim": D, "model_type": "openelm",
        "normalization_layer_name": "rms_norm", "normalize_qk_projections": True,
        "num_gqa_groups": 2, "num_kv_heads": [1, 2], "num_query_heads": [2, 4],
        "num_transformer_layers": 2, "qkv_multipliers": [0.5, 1.0], "rope_freq_constant": 10000,
        "rope_max_length": 4096, "share_input_output_layers": True, "vocab_size": V,
    }  # fmt: skip
    shapes = {"token_embeddings.weight": (V, D), "norm.weight": (D,)}
    for i, (heads, wide) in enumerate([(2, 16), (4, 128)]):
        layer = f"layers.{i}."
        shapes |= {
            layer + "attn.qkv_proj.weight": (2 * heads * 8, D),
            layer + "attn.out_proj.weight": (D, heads * 8), layer + "attn.q_norm.weight": (8,),
            layer + "attn.k_norm.weight": (8,), layer + "ffn.proj_1.weight": (2 * wide, D),
            layer + "ffn.proj_2.weight": (D, wide), layer + "attn_norm.weight": (D,),
            layer + "ffn_norm.weight": (D,),
        }  # fmt: skip
    weights = {k: v for k, v in make_weights(MLP).items() if not k.startswith("language_model.")}
    weights |= {f"language_model.transformer.{k}": torch.randn(v) for k, v in shapes.items()}
    source = write(weights, write_tokenizer=write_byte_level, connector_type="mlp2x_gelu",
                   text_config=text)  # fmt: skip
    config = convert(source, tmp_path / "out")
    assert config.template == "llama" and config.tie_word_embeddings
    model, processor = load_model(tmp_path / "out")
    assert processor.tokenizer.pad_token == "<unk>"
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights.items() if "transformer" in k)
    assert torch.equal(state["language_model.lm_head.weight"],
                       weights["language_model.transformer.token_embeddings.weight"])
    assert show(tmp_path / "out", clip_frames).isfinite().all()
    del weights["language_model.transformer.layers.1.attn.q_norm.weight"]
    source = write(weights, "torn", connector_type="mlp2x_gelu", text_config=text)
    with pytest.raises(ModelFolderError, match="1 weights are missing: .*layers.1.attn.q_norm"):
        convert(source, tmp_path / "again", template="llama", tokenizer_dir=tmp_path / "published")


def test_any_other_missing_unknown_or_misshapen_weight_is_an_error(write, tmp_path):
    out = tmp_path / "out"
    weights = make_weights()
    name = "vision_tower._vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"
    fewer = {n: t for n, t in weights.items() if n != name}
    with pytest.raises(ModelFolderError, match="1 weights are missing: vision_encoder.encoder.lay"):
        convert(write(fewer, "a"), out)
    with pytest.raises(ModelFolderError, match="1 weights are unknown: language_model.extra"):
        convert(write(weights | {"language_model.extra": torch.zeros(1)}, "b"), out)
    with pytest.raises(ModelFolderError, match=r"latents is \(3, 32\) and not \(2, 32\)"):
        convert(write(weights | {PREFIXES[2] + "latents": torch.zeros(3, D)}, "c"), out)
    with pytest.raises(ModelFolderError, match="ties the LLM's head to its embeddings, but they"):
        convert(write(weights | {"language_model.lm_head.weight": torch.zeros(V, D)}, "d"), out)
    tied = {"language_model.lm_head.weight": weights["language_model.model.embed_tokens.weight"]}
    convert(write(weights | {k: v.clone() for k, v in tied.items()}, "e"), out)  # ZeRO-3 has both


def test_two_names_of_one_weight_are_refused(write, tmp_path):
    weights = make_weights()
    name = next(name for name in weights if name.endswith("layers.0.mlp.fc1.weight"))
    twice = weights | {name.replace("vision_model.", ""): weights[name] + 1}
    with pytest.raises(ModelFolderError, match="are one weight of ours"):
        convert(write(twice), tmp_path / "out")


def test_weights_of_integers_are_refused(write, tmp_path):
    weights, name = make_weights(), f"{LLM_Q}.weight"
    with pytest.raises(ModelFolderError, match=r"1 weights are quantized, .*q_proj.*torch.int8"):
        convert(write(weights | {name: weights[name].to(torch.int8)}), tmp_path / "out")


def test_how_a_published_llm_was_quantized_says_nothing_of_its_weights_here(write, tmp_path):
    text = TEXT | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    convert(write(make_weights(), text_config=text), tmp_path / "out")
    assert "quantization" not in (tmp_path / "out/config.json").read_text()


def test_a_tied_model_may_hold_its_head_alone(write, tmp_path):
    weights = make_weights()
    table = weights.pop("language_model.model.embed_tokens.weight")
    convert(write(weights | {"language_model.lm_head.weight": table}), tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out")[0].get_input_embeddings().weight, table)


def test_old_buffers_are_left_out(write, tmp_path):
    old = {PREFIXES[1] + "vision_model.embeddings.position_ids": torch.arange(16)[None],
           PREFIXES[0] + "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # fmt: skip
    convert(write(make_weights() | old), tmp_path / "out")
    load_model(tmp_path / "out")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"connector_type": "qformer9"}, "connector 'qformer9' is unknown; known are groupresam"),
        ({"text_config": {"model_type": "nonsense"}}, "text_config is not usable .*'nonsense'"),
        ({"vision_config": None}, r"vision_config is not usable \(model_type None\)"),
        ({"model_type": "llava_qwen"}, "model_type 'llava_qwen' .* is another system's; known are"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' is not supported"),
        ({"text_config": TEXT | {"model_type": "gemma"}}, "published: no template is known for a"),
        ({"vision_model_name_or_path2": "mof:dino"}, "mixture with 'mof:dino', whose config it do"),
        ({"vision_feature_select_strategy": "full"}, "strategy 'full' is unknown; known are patch"),
        ({"num_queries": "8"}, "published: its config.json makes no model: .*num_queries"),
        ({"tokenizer_model_max_length": 2048.0}, "its config.json makes no model: .*max_seq_len"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_converted_say_why(changes, message, write, tmp_path):
    with pytest.raises(ModelFolderError, match=message):
        convert(write(make_weights(), **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_weights_of_one_name_are_refused(write, tmp_path):
    weights = make_weights()
    name = next(name for name in weights if "connector" in name)
    source = write(weights)
    files = {"1.safetensors": weights, "2.safetensors": {name: weights[name] + 1}}
    for file, part in files.items():
        save_file(part, source / file)
    (source / "model.safetensors").unlink()
    index = {"weight_map": {key: "1.safetensors" for key in weights} | {"x": "2.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=f"there are two weights {name}"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("place, message", [
    (".", "holds the source"), ("published", "holds the source"), ("thesis", "is there already"),
    ("thesis/config.json", "is there already"), ("link", "thesis is there already"),
])  # fmt: skip
def test_nothing_is_lost_where_a_model_is_written(place, message, write, tmp_path):
    source = write(make_weights())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/config.json").write_text('{"model_type": "tlv"}')  # a year's work
    (tmp_path / "link").symlink_to("thesis")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ModelFolderError, match=message):
        convert(source, tmp_path / place)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_model_is_written_whole_or_not_at_all(write, tmp_path, monkeypatch):
    source, out, link = write(make_weights()), tmp_path / "new/out", tmp_path / "link"
    out.mkdir(parents=True)  # empty
    for name in ("out.tmp", "out.old"):
        (tmp_path / "new" / name).mkdir()
    link.symlink_to(out)
    with pytest.raises(ValueError, match="TlvConfig has no field num_fraems"):
        convert(source, link, num_fraems=4)

    def is_full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(TlvProcessor, "save_pretrained", is_full)
        assert main([str(source), str(link)]) == 1
    assert not list(out.iterdir())
    assert convert(source, link, num_frames=4).num_frames == 4
    assert load_model(link)[0].config.num_frames == 4 and link.is_symlink()
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"out", "out.tmp", "out.old"}


def test_the_machines_paths_stay_out_of_the_model(write, write_mof, tmp_path):
    weights, changes, dino_dir = write_mof()
    source = write(weights, **changes)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text(json.dumps(CLIP))
    convert(source, tmp_path / "out", second_vision_dir=dino_dir, vision_dir=tmp_path / "clip")
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text()


def test_a_second_encoder_that_does_not_go_with_the_first_is_refused(write, write_mof, tmp_path):
    weights, changes, dino_dir = write_mof()
    (dino_dir / "config.json").write_text(json.dumps(DINO | {"patch_size": 8}))
    with pytest.raises(ModelFolderError, match="a mixture needs the same patch size"):
        convert(write(weights, **changes), tmp_path / "out", second_vision_dir=dino_dir)


@pytest.mark.parametrize("also", [["adapter_config.json"], PARTS])
def test_another_systems_adapters_and_parts_are_not_taken_for_ours(also, write, tmp_path):
    source = write(make_weights(), model_type="llava_llama")
    for name in also:
        (source / name).write_text("{}") if "." in name else (source / name).mkdir()
    with pytest.raises(ModelFolderError, match="'llava_llama' .* is another system's; known are"):
        convert(source, tmp_path / "out")


CLIPS_PIXELS = ({"shortest_edge": 336}, {"height": 336, "width": 336},
                (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PIXELS = {  # encoder: size, crop_size, mean and deviation of its preprocessor_config.json
    "openai/clip-vit-large-patch14-336": CLIPS_PIXELS,
    "google/siglip-so400m-patch14-384": (
        {"height": 384, "width": 384}, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "facebook/dinov2-large": (
        {"shortest_edge": 256}, {"height": 224, "width": 224},
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CLIP + DINOv2": CLIPS_PIXELS,
}  # fmt: skip


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_is_shown_pixels_as_its_own_image_processor_makes_them(encoder):
    made = make_image_processor("published", AutoConfig.for_model(**ENCODERS[encoder]))
    crop = made.crop_size and dict(made.crop_size)
    mean, std = tuple(made.image_mean), tuple(made.image_std)
    assert (dict(made.size), crop, mean, std) == PIXELS[encoder]
    assert made.rescale_factor == 1 / 255 and made.resample == Image.Resampling.BICUBIC


def test_published_positions_of_dinov2_are_for_518_pixels_and_its_pictures_have_224():
    fields = dict(model_type="dinov2", hidden_size=1024, image_size=518, patch_size=14)
    config = read_vision_config("published", {"vision_config": fields}, "flat")
    assert (config.image_size, picture_size(config)) == (518, 224)


def test_an_encoder_without_a_known_image_processor_is_an_error():
    with pytest.raises(ModelFolderError, match="published: no image processor .* a 'vit' encoder"):
        make_image_processor("published", AutoConfig.for_model("vit"))


def test_the_command_says_in_one_line_what_is_wrong(write, tmp_path, capsys):
    out = str(tmp_path / "out")
    for source, options, message in (
        (tmp_path, [], "no config.json in it"),
        (write(make_weights()), ["--template", "gemma"], "template 'gemma' ends an answer with"),
    ):
        assert main([str(source), out, *options]) == 1
        told = capsys.readouterr().out
        assert message in told and str(source) in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_overrules_and_tells(write, tmp_path, capsys):
    source = write(make_weights())
    options = ["--num-frames", "8", "--template", "qwen2_chat"]
    assert main([str(source), str(tmp_path / "out"), *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_frames"] == 8 and told["template"] == "qwen2_chat"
    model, processor = load_model(tmp_path / "out")
    assert processor.num_frames == 8 and model.config.template == "qwen2_chat"


def test_the_command_reads_frames_by_the_second(write, tmp_path, capsys):
    """For the checkpoints named 1fps, whose config.json does not say so."""
    source, out = str(write(make_weights())), str(tmp_path / "out")
    main([source, out, "--sampling", "fps", "--fps", "1", "--max-frames", "128"])
    told = json.loads(capsys.readouterr().out)
    assert (told["sampling"], told["fps"], told["max_frames"]) == ("fps", 1.0, 128)
    model, processor = load_model(out)
    for part in (model.config, processor):
        assert (part.sampling, part.fps, part.max_frames) == ("fps", 1.0, 128)
    with pytest.raises(SystemExit):
        main([source, out, "--fps", "2"])
    assert "say nothing without --sampling fps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([source, out, "--sampling", "fps", "--num-frames", "8"])
    assert "--num-frames says nothing with --sampling fps" in capsys.readouterr().err
    for options in (["--num-frames", "0"], ["--sampling", "fps", "--fps", "0"]):
        assert main([source, str(tmp_path / "none"), *options]) == 1
        assert re.match(r"(num_frames|fps) = 0(\.0)? must be more than 0", capsys.readouterr().out)


def test_the_published_list_of_920_names_is_ours(published_keys):
    with torch.device("meta"):
        model = TlvForConditionalGeneration(paper_config())
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours.pop("language_model.lm_head.weight")  # tied
    theirs = {rename(name): tuple(shape) for name, shape in published_keys["tensors"].items()}
    assert len(theirs) == published_keys["n"] == 920 and theirs == ours
    assert sum(math.prod(shape) for shape in theirs.values()) == 3_629_878_336
    parts = Counter(name.split(".")[0] for name in theirs)
    assert parts == {"language_model": 434, "vision_encoder": 448, "connector": 38}


PUBLISHED = Path(__file__).parent / "published"  # facts of the checkpoint of 16 groups, 512 queries


@pytest.fixture
def published_keys():
    return json.loads((PUBLISHED / "tinyllava_video_keys.json").read_text())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_published_facts_are_those_of_the_published_files(published_keys):
    """The hashes are those of config.json and model.safetensors.index.json on the Hub."""
    config = (PUBLISHED / "tinyllava_video_config.json").read_bytes()
    assert sha256(config) == "2cb12a736e6e63b66c323ac4401aac9b84093721e05a4a035b975a0b45bdac26"
    shards, size = [[]], 0
    for name, shape in published_keys["tensors"].items():
        size += 2 * math.prod(shape)  # bfloat16
        if size > 5e9:
            shards, size = [*shards, []], 2 * math.prod(shape)
        shards[-1].append(name)
    assert [len(names) for names in shards] == [344, 576]
    places = {name: f"model-{number:05}-of-00002.safetensors"
              for number, names in enumerate(shards, start=1) for name in names}  # fmt: skip
    index = {"metadata": {"total_size": 2 * published_keys["params"]}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert sha256(text.encode()) == (
        "c8f3da7529c760c309d14bb2b7cf6faaecc2a29c3ad434e193aec986ba0bb3d3")


def test_the_published_config_becomes_the_paper_model(tokenizer):
    raw = json.loads((PUBLISHED / "tinyllava_video_config.json").read_text())
    config = translate_config("published", raw, "flat", tokenizer)
    assert count_parameters(config) == {
        "vision": 428_225_600, "connector": 115_714_048, "llm": 3_085_938_688,
        "total": 3_629_878_336, "unseen": 428_225_600 - 397_745_440}  # fmt: skip
    assert (config.connector_type, config.num_queries, config.num_groups) == (
        "group_resampler", 512, 16)  # fmt: skip
    assert (config.num_frames, config.sampling, config.max_seq_len, config.long_rows) == (
        16, "uniform", 3072, "cut")  # fmt: skip
    assert (config.template, config.vision_feature_layer, config.image_mode) == (
        "qwen2_base", -2, "square")  # fmt: skip
    assert config.drop_first_patch and config.tie_word_embeddings
    assert count_tokens(config, 16) == 512
    ours = paper_config()
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size",
                 "rope_parameters", "bos_token_id", "eos_token_id"):  # fmt: skip
        assert getattr(config.text_config, name) == getattr(ours.text_config, name), name
    for name in ("layer_norm_eps", "hidden_act", "image_size", "patch_size"):
        assert getattr(config.vision_config, name) == getattr(ours.vision_config, name), name


def test_the_template_may_be_the_tokenizers_own_and_must_end_as_it_does(write, tmp_path):
    source = write(make_weights())
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(source)
    with pytest.raises(ValueError, match="'qwen2_base' ends an answer with .* own takes its chat"):
        convert(source, tmp_path / "out", template="qwen2_base")
    assert convert(source, tmp_path / "out", template="own").template["stop"] == "<|im_end|>"
    model, processor = load_model(tmp_path / "out")
    turns, messages = [("Who?", "He.")], [("user", "Who?"), ("assistant", "He.")]
    wanted = tokenizer.apply_chat_template(
        [dict(role=role, content=text) for role, text in messages], tokenize=False
    )
    assert render(turns, model.config.template) == wanted


def test_the_tokenizer_may_come_from_the_llms_folder(write, tmp_path, tokenizer):
    source = write(make_weights())
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelFolderError, match="source = .*nothing to load.*; give the language"):
        convert(source, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text(json.dumps(TEXT))  # an empty one would be made
    with pytest.raises(ModelFolderError, match="tokenizer_dir = .*empty: .*no token but special"):
        convert(source, tmp_path / "out", tokenizer_dir=tmp_path / "empty")
    tokenizer.save_pretrained(tmp_path / "llm")
    convert(source, tmp_path / "out", tokenizer_dir=tmp_path / "llm")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|endoftext|>"
