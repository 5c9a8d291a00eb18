"""Every language model of the published designs, as a small random folder of its architecture."""

import pytest
import torch
from toy_tokenizer import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tlv.ask import answer
from tlv.builders import build_model, load_model, with_connector
from tlv.chat import IGNORE_INDEX, encode
from tlv.model import TlvConfig
from tlv.templates import render

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives",
    "helpful, detailed, and polite answers to the user's questions. USER: What is he doing?",
    "ASSISTANT: Running. USER: Where? ASSISTANT: In a park. A red circle moves to the left.",
]
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=512, initializer_range=0.2)  # fmt: skip
# kind: fields of its config, template, special tokens of its tokenizer, puts a BOS in front
LLMS = {
    "llama": (dict(num_key_value_heads=2), "llama",
              dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"), True),
    "stablelm": (dict(num_key_value_heads=4, use_qkv_bias=True, partial_rotary_factor=0.25), "phi",
                 dict(eos_token="<|endoftext|>", unk_token="<|endoftext|>"), False),
    "phi": (dict(partial_rotary_factor=0.5), "phi",
            dict(eos_token="<|endoftext|>", unk_token="<|endoftext|>"), False),
    "gemma": (dict(num_key_value_heads=1, head_dim=8), "gemma",
              dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"),
              True),
    "qwen2": (dict(num_key_value_heads=2, tie_word_embeddings=True), "qwen2_base",
              dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>"), False),
    "openelm": (dict(head_dim=8, num_gqa_groups=2, ffn_dim_divisor=16), "llama",
                dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"), True),
    "gpt_neox": (dict(rotary_pct=0.5), "qwen2_chat",
                 dict(eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]), False),
}  # fmt: skip


@pytest.fixture(params=LLMS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    fields, _, special, has_bos = LLMS[kind]
    tokenizer = make_tokenizer(CORPUS, special, has_bos)
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
             "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **fields}))
    model.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


@pytest.fixture
def built(kind, folder, vision_dir):
    return build_model(vision_dir, folder, template=LLMS[kind][1], num_queries=8, num_groups=4,
                       num_resampler_layers=1, resampler_heads=2, resampler_head_dim=8,
                       num_frames=4)  # fmt: skip


def test_text_alone_gives_the_language_models_own_logits(folder, built):
    model, processor = built
    llm = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = processor.tokenizer("A red circle moves.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, llm(ids).logits, atol=1e-5)


def test_its_own_head_is_kept_with_bias_and_ties(kind, folder, built, tmp_path):
    model, processor = built
    head = model.language_model.get_output_embeddings()
    assert (head.bias is not None) == (kind == "phi")
    is_tied = head.weight is model.language_model.get_input_embeddings().weight
    assert is_tied == model.config.tie_word_embeddings
    assert is_tied == (kind in ("gemma", "qwen2", "openelm"))
    for part in built:
        part.save_pretrained(tmp_path / "whole")
    again, _ = load_model(tmp_path / "whole")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_answers_and_their_end_are_learnt_and_padding_is_no_text(kind, built, clip_frames):
    model, processor = built
    tokenizer, template = processor.tokenizer, LLMS[kind][1]
    turns = [("<video>\nWhat is he doing?", "Running."), ("Where?", "In a park.")]
    row = encode(turns, template, tokenizer, 8)
    learnt = tokenizer.decode([i for i in row["labels"] if i != IGNORE_INDEX])
    stop = tokenizer.eos_token
    assert learnt.replace(" ", "") == f"Running.{stop}Inapark.{stop}"
    assert tokenizer.pad_token is not None
    texts = [render([("<video>\nWhat is he doing?", None)], template), "Hi."]
    batch = processor(text=texts, videos=[clip_frames(), None])
    alone = processor(text=texts[:1], videos=[clip_frames()])
    with torch.no_grad():
        both, one = model(**batch).logits[0, -1], model(**alone).logits[0, -1]
    assert torch.allclose(both, one, atol=1e-4)
    length = batch["input_ids"].shape[1]
    assert length < model.generate(**batch, max_new_tokens=4).shape[1] <= length + 4
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_pad_is_the_unknown_token_where_none_is_named(kind, built):
    tokenizer = built[1].tokenizer
    wanted = {"llama": "<unk>", "openelm": "<unk>", "gemma": "<pad>", "gpt_neox": "<|im_end|>"}
    assert tokenizer.pad_token == wanted.get(kind, "<|endoftext|>")


def test_a_template_of_another_model_is_refused_before_anything_runs(vision_dir, tmp_path):
    fields, _, special, has_bos = LLMS["llama"]
    tokenizer = make_tokenizer(CORPUS, special, has_bos)
    config = AutoConfig.for_model("llama", **{**SIZES, **fields, "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'gemma' ends an answer with '<eos>', which is . tokens "
                       ".*its own end token is '</s>', that of template llama"):
        build_model(vision_dir, tmp_path, template="gemma")


@pytest.mark.parametrize("kind", ["gemma"], indirect=True)
def test_gemma_scales_video_tokens_as_it_scales_words(kind, built, clip_frames):
    """Its published forward multiplies all embeddings by the root of their width."""
    model, processor = built
    pixels = processor.process_frames(clip_frames(4))
    row = encode([("<video>\nWhere?", "In a park.")], "gemma", processor.tokenizer, 8)
    ids = torch.tensor([row["input_ids"]])
    is_video = ids == model.config.video_token_id
    with torch.no_grad():
        x = model.get_input_embeddings().weight[ids.masked_fill(is_video, 0)]  # (1, L, D)
        x[is_video] = model.encode_videos([pixels])[0]
        wanted = model.language_model(inputs_embeds=x * x.shape[-1] ** 0.5).logits
        ours = model(input_ids=ids, pixel_values_videos=pixels[None]).logits
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert not torch.allclose(ours, model.language_model(inputs_embeds=x).logits, atol=1e-2)


@pytest.fixture
def zephyr_dir(tmp_path):
    """A Llama folder whose tokenizer has a chat template of its own."""
    fields, _, special, has_bos = LLMS["llama"]
    tokenizer = make_tokenizer(CORPUS, special, has_bos)
    tokenizer.chat_template = (
        "{{ 'Be brief {x}.</s>\n' }}{% for m in messages %}"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    config = AutoConfig.for_model("llama", **{**SIZES, **fields, "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "zephyr")
    tokenizer.save_pretrained(tmp_path / "zephyr")
    return tmp_path / "zephyr"


def test_the_tokenizers_own_template_travels_with_the_model(zephyr_dir, vision_dir, tmp_path,
                                                            clip_frames):
    """Into config.json, through another connector, and into training rows and answers."""
    built = build_model(vision_dir, zephyr_dir, template="own", connector_type="linear",
                        num_frames=4)  # fmt: skip
    for part in built:
        part.save_pretrained(tmp_path / "whole")
    model, processor = load_model(tmp_path / "whole")
    own = model.config.template
    assert own == built[0].config.template and own["stop"] == "</s>"
    turns = [("<video>\nWhat is he doing?", "Running."), ("Where?", None)]
    text = render(turns, own)
    assert text == (
        "Be brief {x}.</s>\n<|user|>\n<video>\nWhat is he doing?</s>\n<|assistant|>\nRunning.</s>\n"
        "<|user|>\nWhere?</s>\n<|assistant|>\n"
    )
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text",
                                                                 "text": "What is he doing?"}]},
                {"role": "assistant", "content": "Running."},
                {"role": "user", "content": "Where?"}]  # fmt: skip
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == text
    batch = processor(text=text, videos=[clip_frames()])
    ids = encode(turns, own, processor.tokenizer, processor.num_tokens(4))["input_ids"]
    assert batch["input_ids"].tolist() == [ids]
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]
    assert isinstance(answer(model, processor, clip_frames(), "Where?", max_new_tokens=3), str)
    other, _ = with_connector(model, processor, connector_type="mlp2x_gelu")
    assert other.config.template == own


def test_an_own_template_needs_a_tokenizer_that_has_one(zephyr_dir, vision_dir):
    tokenizer = AutoTokenizer.from_pretrained(zephyr_dir)
    tokenizer.chat_template = None
    (zephyr_dir / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(zephyr_dir)
    with pytest.raises(ValueError, match="'own' is .* of llm_dir = .*, but there is none; take"):
        build_model(vision_dir, zephyr_dir, template="own")
    with pytest.raises(ValueError, match="'own' has to be read from a tokenizer"):
        TlvConfig(template="own")


def test_a_template_with_another_end_is_refused_before_anything_runs(zephyr_dir, vision_dir):
    tokenizer = AutoTokenizer.from_pretrained(zephyr_dir)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(zephyr_dir)
    with pytest.raises(ValueError, match="'llama' ends an answer with '</s>', which is not the end "
                       "token .* that of template qwen2_instruct or qwen2_chat; own takes its "):
        build_model(vision_dir, zephyr_dir, template="llama")


def test_a_tokenizer_with_nothing_to_pad_with_is_refused():
    from tlv.chat import prepare_tokenizer

    bare = make_tokenizer(CORPUS, dict(additional_special_tokens=["<|im_end|>"]), False)
    with pytest.raises(ValueError, match="no pad, unknown or end token; name one as pad_token"):
        prepare_tokenizer(bare, "qwen2_chat", "llm_dir = x")
