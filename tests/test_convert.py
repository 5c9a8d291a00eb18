"""Published checkpoints: every layout, from names typed out from the published lists."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from toy_tokenizer import make_tokenizer
from transformers import AutoTokenizer

from tlv.builders import load_model
from tlv.chat import render
from tlv.convert import convert, main, unseen_names
from tlv.designs import paper_config
from tlv.model import TlvForConditionalGeneration
from tlv.pretrained import ModelFolderError
from tlv.published import rename

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


def vision_shapes():
    shapes = {"embeddings.patch_embedding.weight": (D_V, 3, 4, 4),
              "embeddings.patch_embedding.bias": (D_V,),
              "embeddings.position_embedding.weight": (16, D_V)}  # fmt: skip
    for i in range(VISION_LAYERS):
        layer = f"encoder.layers.{i}."
        for name in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj",
                     "self_attn.out_proj"):  # fmt: skip
            shapes |= {f"{layer}{name}.weight": (D_V, D_V), f"{layer}{name}.bias": (D_V,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (D_V,), f"{layer}{name}.bias": (D_V,)}
        shapes |= {layer + "mlp.fc1.weight": (HIDDEN, D_V), layer + "mlp.fc1.bias": (HIDDEN,),
                   layer + "mlp.fc2.weight": (D_V, HIDDEN), layer + "mlp.fc2.bias": (D_V,)}
    shapes |= {"post_layernorm.weight": (D_V,), "post_layernorm.bias": (D_V,),
               "head.probe": (1, 1, D_V), "head.attention.in_proj_weight": (3 * D_V, D_V),
               "head.attention.in_proj_bias": (3 * D_V,),
               "head.attention.out_proj.weight": (D_V, D_V),
               "head.attention.out_proj.bias": (D_V,), "head.layernorm.weight": (D_V,),
               "head.layernorm.bias": (D_V,), "head.mlp.fc1.weight": (HIDDEN, D_V),
               "head.mlp.fc1.bias": (HIDDEN,), "head.mlp.fc2.weight": (D_V, HIDDEN),
               "head.mlp.fc2.bias": (D_V,)}  # fmt: skip
    return {"vision_model." + name: shape for name, shape in shapes.items()}


def resampler_shapes(num_latents):
    layer = {"0.norm_media.weight": (D,), "0.norm_media.bias": (D,), "0.norm_latents.weight": (D,),
             "0.norm_latents.bias": (D,), "0.to_q.weight": (512, D), "0.to_kv.weight": (1024, D),
             "0.to_out.weight": (D, 512), "1.0.weight": (D,), "1.0.bias": (D,),
             "1.1.weight": (4 * D, D), "1.3.weight": (D, 4 * D)}  # fmt: skip
    shapes = {"latents": (num_latents, D), "linear.weight": (D, D_V), "linear.bias": (D,),
              "norm.weight": (D,), "norm.bias": (D,)}  # fmt: skip
    return shapes | {f"layers.0.{name}": shape for name, shape in layer.items()}


MLP = {"0.weight": (D, D_V), "0.bias": (D,), "2.weight": (D, D), "2.bias": (D,)}
PREFIXES = ("language_model.", "vision_tower._vision_tower.", "connector._connector.")


def make_weights(connector=None, prefixes=PREFIXES, dtype=torch.float32):
    """Random tensors under published names."""
    generator = torch.Generator().manual_seed(0)
    parts = llm_shapes(), vision_shapes(), connector or resampler_shapes(2)
    return {
        prefix + name: (torch.randn(shape, generator=generator) * 0.2).to(dtype)
        for prefix, shapes in zip(prefixes, parts, strict=True) for name, shape in shapes.items()
    }  # fmt: skip


@pytest.fixture
def write(tmp_path, tokenizer):
    """write(weights, **changes of config) -> a flat published folder."""

    def build(weights, name="published", **changes):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        if weights is not None:
            save_file(weights, folder / "model.safetensors")
        tokenizer.save_pretrained(folder)
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
        convert(source, tmp_path / "out")


def test_a_pickle_of_code_is_not_run(write, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("x",))

    source = write(None)
    torch.save({"language_model.model.norm.weight": Trap()}, source / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="pytorch_model.bin: not readable as tensors"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def write_parts(folder, weights, suffix=""):
    """The three folders of a pretraining run; `suffix` as LoRA output names its matrices."""
    for part, prefix in (("language_model", "language_model."),
                         ("vision_tower", "vision_tower._vision_tower."),
                         ("connector", "connector.")):  # fmt: skip
        (folder / part).mkdir()
        chosen = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        if part == "language_model" and suffix:
            chosen = {n.replace("_proj.", f"_proj.{suffix}."): t for n, t in chosen.items()}
        torch.save(chosen, folder / part / "pytorch_model.bin")


def test_an_image_checkpoint_in_three_folders(write, tmp_path, clip_frames):
    weights = make_weights(MLP)
    flat = write(weights, "flat", connector_type="mlp2x_gelu")
    parts = write(None, "parts", connector_type="mlp2x_gelu")
    write_parts(parts, weights)
    for name, source in (("a", flat), ("b", parts)):
        config = convert(source, tmp_path / name)
        assert config.num_frames == 1 and config.connector_type == "mlp2x_gelu"
    assert torch.equal(show(tmp_path / "a", clip_frames), show(tmp_path / "b", clip_frames))
    assert load_model(tmp_path / "a")[1].num_tokens(1) == 15


@pytest.mark.parametrize("is_tied", [True, False])
def test_lora_output_is_merged(is_tied, write, tmp_path):
    weights = make_weights(MLP)
    if not is_tied:
        weights["language_model.lm_head.weight"] = torch.randn(V, D)
    source = write(None, connector_type="mlp2x_gelu",
                   text_config=TEXT | {"tie_word_embeddings": is_tied})  # fmt: skip
    write_parts(source, weights, "base_layer")
    q = "language_model.model.layers.1.self_attn.q_proj"
    a, b = torch.randn(2, D), torch.randn(D, 2)
    save_file({f"base_model.model.{q}.lora_A.weight": a, f"base_model.model.{q}.lora_B.weight": b},
              source / "adapter_model.safetensors")  # fmt: skip
    (source / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    convert(source, tmp_path / "out")
    state = load_model(tmp_path / "out")[0].state_dict()
    wanted = weights[f"{q}.weight"] + 4 * b @ a
    assert torch.allclose(state[f"{q}.weight"], wanted, atol=1e-5)
    k = "language_model.model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(state[k], weights[k])


def test_a_legacy_checkpoint_without_its_last_encoder_layer(write, tmp_path, vision_dir, tokenizer):
    """729 tokens, its own LLM head with a bias; block 26, final norm and head are not there."""
    shapes = {"model.embed_tokens.weight": (V, D), "model.final_layernorm.weight": (D,),
              "model.final_layernorm.bias": (D,), "lm_head.weight": (V, D), "lm_head.bias": (V,)}
    for name in ("q_proj", "k_proj", "v_proj", "dense"):
        shapes |= {f"model.layers.0.self_attn.{name}.weight": (D, D),
                   f"model.layers.0.self_attn.{name}.bias": (D,)}  # fmt: skip
    shapes |= {"model.layers.0.mlp.fc1.weight": (64, D), "model.layers.0.mlp.fc1.bias": (64,),
               "model.layers.0.mlp.fc2.weight": (D, 64), "model.layers.0.mlp.fc2.bias": (D,),
               "model.layers.0.input_layernorm.weight": (D,),
               "model.layers.0.input_layernorm.bias": (D,)}  # fmt: skip
    vision = {n: s for n, s in vision_shapes().items()
              if "layers.2." not in n and "post_layernorm" not in n and "head" not in n}
    shapes |= {"model.vision_tower.vision_tower." + n: s for n, s in vision.items()}
    shapes |= {"model.mm_projector." + n: s for n, s in MLP.items()}
    weights = {n: torch.randn(s) * 0.2 for n, s in shapes.items()}
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps(VISION))
    source = write(weights)
    legacy = {
        "architectures": ["TinyLlavaPhiForCausalLM"], "model_type": "tiny_llava_phi",
        "hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "partial_rotary_factor": 0.5, "vocab_size": V,
        "tie_word_embeddings": False, "mm_vision_tower": "elsewhere/siglip",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 3072,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(legacy))
    with pytest.raises(ModelFolderError, match="mm_vision_tower 'elsewhere/siglip' is unknown"):
        convert(source, tmp_path / "out")
    config = convert(source, tmp_path / "out", vision_dir=encoder)
    model, processor = load_model(tmp_path / "out")
    assert (config.template, config.image_mode, config.drop_first_patch) == ("phi", "pad", False)
    assert processor.num_tokens(1) == 16  # every patch
    assert torch.equal(model.language_model.lm_head.bias, weights["lm_head.bias"])
    last = model.state_dict()["vision_encoder.encoder.layers.2.mlp.fc1.weight"]
    assert not last.any()  # zeros that nothing reads


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
    source = write(weights, connector_type="mlp2x_gelu", text_config=text)
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    make_tokenizer(["A red circle."], special, True, V).save_pretrained(source)
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
        convert(source, tmp_path / "out", template="llama", tokenizer_dir=tmp_path / "published")


def test_what_may_be_missing_is_what_the_output_never_sees(write, tmp_path, clip_frames):
    weights = make_weights()
    config = convert(write(weights), tmp_path / "all")
    unseen = unseen_names(config)
    kept = {n: t for n, t in weights.items() if not unseen.match(rename(n))}
    assert 0 < len(kept) < len(weights)
    convert(write(kept, "few"), tmp_path / "few")
    assert torch.equal(show(tmp_path / "all", clip_frames), show(tmp_path / "few", clip_frames))


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


def test_old_buffers_are_left_out(write, tmp_path):
    old = {PREFIXES[1] + "vision_model.embeddings.position_ids": torch.arange(16)[None],
           PREFIXES[0] + "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # fmt: skip
    convert(write(make_weights() | old), tmp_path / "out")
    load_model(tmp_path / "out")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"connector_type": "qformer9"}, "connector 'qformer9' is unknown; known are groupresam"),
        ({"model_type": "llava_qwen"}, "model_type 'llava_qwen' .* is another system's; known are"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' is not supported"),
        ({"text_config": TEXT | {"model_type": "gemma"}}, "no template is known for a 'gemma' mod"),
        ({"vision_model_name_or_path2": "mof:dino"}, "mixture with 'mof:dino', whose config it do"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_converted_say_why(changes, message, write, tmp_path):
    with pytest.raises(ModelFolderError, match=message):
        convert(write(make_weights(), **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_overrules_and_tells(write, tmp_path, capsys):
    source = write(make_weights())
    main([str(source), str(tmp_path / "out"), "--num-frames", "8", "--template", "qwen2_chat"])
    told = json.loads(capsys.readouterr().out)
    assert told["num_frames"] == 8 and told["template"] == "qwen2_chat"
    model, processor = load_model(tmp_path / "out")
    assert processor.num_frames == 8 and model.config.template == "qwen2_chat"


def test_the_published_list_of_920_names_is_ours(published_keys):
    with torch.device("meta"):
        model = TlvForConditionalGeneration(paper_config())
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours.pop("language_model.lm_head.weight")  # tied
    theirs = {rename(name): tuple(shape) for name, shape in published_keys["tensors"].items()}
    assert len(theirs) == published_keys["n"] == 920 and theirs == ours
    assert sum(math.prod(shape) for shape in theirs.values()) == 3_629_878_336


@pytest.fixture
def published_keys():
    from tlv import ROOT

    path = ROOT.parent / "shared/reference/tinyllava_video_keys.json"
    if not path.is_file():
        pytest.skip(f"{path.name}: the list of the published names is not beside the project")
    return json.loads(path.read_text())


def test_the_tokenizer_may_come_from_the_llms_folder(write, tmp_path, tokenizer):
    source = write(make_weights())
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelFolderError, match="no tokenizer in it; give the language model's"):
        convert(source, tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "llm")
    convert(source, tmp_path / "out", tokenizer_dir=tmp_path / "llm")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|endoftext|>"
