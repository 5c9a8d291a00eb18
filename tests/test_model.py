"""The model: saving, batching, generating, learning; counts of the paper-size model."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from tlv.builders import build_model, load_model
from tlv.chat import IGNORE_INDEX, encode
from tlv.designs import count_parameters, paper_config
from tlv.model import TlvConfig
from tlv.pretrained import ModelFolderError
from tlv.templates import render
from tlv.vision import count_unseen, encode_frames, load_vision_encoder

ASKED = [("<video>\nWhat is he doing?", "Running.")]


def row(processor, turns, num_frames=4, template="qwen2_base"):
    """One encoded row as tensors (1, L)."""
    has_video = any("<video>" in question for question, _ in turns)
    count = processor.num_tokens(num_frames) if has_video else None
    encoded = encode(turns, template, processor.tokenizer, count)
    return {key: torch.tensor([value]) for key, value in encoded.items()}


def pad(rows, pad_id):
    """Rows (1, L_i) -> a batch padded on the right."""
    length = max(r["input_ids"].shape[1] for r in rows)

    def grow(x, value):
        return torch.nn.functional.pad(x, (0, length - x.shape[1]), value=value)

    ids = torch.cat([grow(r["input_ids"], pad_id) for r in rows])
    labels = torch.cat([grow(r["labels"], IGNORE_INDEX) for r in rows])
    mask = torch.cat([grow(torch.ones_like(r["input_ids"]), 0) for r in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def prompts(processor, *questions):
    return [render([(question, None)], "qwen2_base") for question in questions]


# ---- the encoder ----------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_states_of_a_small_siglip():
    """Sums computed independently, on two versions of transformers."""
    config = SiglipVisionConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=3,
                                num_attention_heads=4, patch_size=14, image_size=56)  # fmt: skip
    encoder = SiglipVisionModel(config).eval()
    rng, state = np.random.RandomState(3), encoder.state_dict()
    for key in sorted(state):
        state[key] = torch.from_numpy(rng.standard_normal(tuple(state[key].shape)) * 0.2).float()
    encoder.load_state_dict(state)
    x = torch.from_numpy(np.random.RandomState(5).standard_normal((1, 3, 56, 56))).float()
    sums = [encode_frames(encoder, x, layer).sum().item() for layer in range(4)]
    assert sums == pytest.approx([-9.3907, -99.8803, -134.578, -228.6171], abs=2e-3)
    features = encode_frames(encoder, x)
    assert torch.equal(features, encode_frames(encoder, x, 2)) and features.shape == (1, 16, 48)
    assert torch.equal(encode_frames(encoder, x, drop_first_patch=True), features[:, 1:])
    unseen = [encoder.encoder.layers[2], encoder.post_layernorm, encoder.head]
    for part in unseen:
        for parameter in part.parameters():
            parameter.zero_()
    assert torch.equal(encode_frames(encoder, x), features)
    assert count_unseen(config) == sum(p.numel() for part in unseen for p in part.parameters())


def test_the_encoder_of_a_pair_keeps_its_weights(vision_dir):
    pair = AutoModel.from_pretrained(vision_dir)
    encoder = load_vision_encoder(vision_dir)
    assert type(encoder) is SiglipVisionModel
    wanted = pair.vision_model.state_dict()
    assert wanted.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, wanted[key]) for key, value in encoder.state_dict().items())


# ---- saving ---------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_and_loaded_alike(build_tiny, tmp_path, clip_frames):
    model, processor = build_tiny()
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    batch = processor(text=prompts(processor, "<video>\nWhere?"), videos=[clip_frames()])
    logits = model(**batch).logits
    for loaded in (load_model(tmp_path)[0], AutoModel.from_pretrained(tmp_path),
                   AutoModelForImageTextToText.from_pretrained(tmp_path)):  # fmt: skip
        assert torch.equal(loaded.eval()(**batch).logits, logits)
        llm = loaded.language_model
        assert llm.lm_head.weight.data_ptr() == llm.model.embed_tokens.weight.data_ptr()
        assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "language_model.lm_head.weight" not in file.keys()  # tied: stored once
        assert "connector.layers.0.0.to_kv.weight" in file.keys()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "tlv" and saved["vision_config"]["hidden_size"] == 32
    assert not list(tmp_path.glob("*.bin"))


def test_matrices_of_the_paper_model_start_with_the_published_deviation():
    assert paper_config().initializer_range == 0.02


@pytest.mark.parametrize("name, std", [("qformer", 0.02), ("resampler", 1.0),
                                       ("bench_resampler", 1.0)])
def test_latents_start_as_published(name, std, build_tiny):
    fields = dict(num_queries=512, num_groups=1, connector_width=64)
    latents = build_tiny(connector_type=name, **fields)[0].connector.latents
    assert latents.numel() >= 512 * 32 and latents.std().item() == pytest.approx(std, rel=0.03)
    assert abs(latents.mean().item()) < 0.03 * std


def test_build_keeps_the_folders_weights_and_the_seed(build_tiny, llm_dir):
    model, _ = build_tiny()
    wanted = AutoModelForCausalLM.from_pretrained(llm_dir).state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in model.language_model.state_dict().items())
    again, _ = build_tiny()
    other, _ = build_tiny(seed=1)
    assert torch.equal(model.connector.latents, again.connector.latents)
    assert not torch.equal(model.connector.latents, other.connector.latents)
    wide, _ = build_tiny(num_queries=512, num_groups=1, resampler_heads=8, resampler_head_dim=64)
    assert wide.connector.latents.std().item() == pytest.approx(1.0, abs=0.03)
    for name, value in wide.connector.named_parameters():
        if value.ndim == 2 and name != "latents":  # this LLM's initializer_range is 0.2
            assert value.std().item() == pytest.approx(0.2, rel=0.1), name
        elif value.ndim == 1:
            assert value.eq(1 if "norm" in name and "weight" in name or name.endswith("1.0.weight")
                            else 0).all(), name  # fmt: skip


def test_bfloat16(build_tiny, tmp_path, clip_frames):
    model, processor = build_tiny(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, torch.bfloat16)
    batch = processor(text=prompts(processor, "<video>\nWhere?"), videos=[clip_frames()])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


# ---- batches --------------------------------------------------------------------------------


@torch.no_grad()
def test_videos_pictures_and_text_in_one_batch(tiny, clip_frames):
    """Logits of a left-padded batch equal those of each row alone, with clips of unequal length."""
    model, processor = tiny
    text = prompts(processor, "<video>\nWhat is it?", "Hello, who are you there?",
                   "<video>\nA picture of what?", "<video>\nWhere?")  # fmt: skip
    videos = [clip_frames(4), None, None, clip_frames(3, seed=1)]
    images = [None, None, clip_frames(1, seed=2)[0], None]
    batch = processor(text=text, videos=videos, images=images)
    assert [len(clip) for clip in batch["pixel_values_videos"]] == [4, 1, 3]
    logits = model(**batch).logits
    for k in range(4):
        alone = processor(text=text[k], videos=[videos[k]], images=[images[k]])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][k, -length:], alone["input_ids"][0])
        assert torch.allclose(logits[k, -length:], model(**alone).logits[0], atol=2e-5)


@torch.no_grad()
def test_rows_share_a_clip(tiny, clip_frames):
    model, processor = tiny
    one, two = clip_frames(4), clip_frames(4, seed=1)
    text = prompts(processor, "<video>\nWhat?", "Hi.", "<video>\nWhere?", "<video>\nWho?")
    batch = processor(text=text, videos=[one, None, two, one])
    assert batch["video_index"].tolist() == [0, 1, 0] and len(batch["pixel_values_videos"]) == 2
    apart = dict(batch, video_index=None, pixel_values_videos=torch.stack(
        [batch["pixel_values_videos"][k] for k in (0, 1, 0)]))  # fmt: skip
    assert torch.allclose(model(**batch).logits, model(**apart).logits, atol=1e-6)


@torch.no_grad()
def test_features_replace_pixels(tiny, clip_frames):
    model, processor = tiny
    batch = processor(text=prompts(processor, "<video>\nWhat?", "<video>\nWhere?"),
                      videos=[clip_frames(4), clip_frames(4, seed=1)])  # fmt: skip
    pixels = batch.pop("pixel_values_videos")
    features = [model.vision_features(clip) for clip in pixels]
    assert features[0].shape == (4, 4, 32)
    wanted = model(**batch, pixel_values_videos=pixels).logits
    assert torch.allclose(model(**batch, video_features=features).logits, wanted, atol=1e-6)
    cached = model(**batch, video_features=torch.stack(features)).logits
    assert torch.allclose(cached, wanted, atol=1e-6)


def test_mismatches_are_refused(tiny, clip_frames):
    model, processor = tiny
    batch = processor(text=prompts(processor, "<video>\nWhat?"), videos=[clip_frames()])
    ids, pixels = batch["input_ids"], batch["pixel_values_videos"]
    with pytest.raises(ValueError, match="1 rows hold placeholders, but 0 clips"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="1 rows hold placeholders, but 2 clips"):
        model(input_ids=ids, pixel_values_videos=torch.cat([pixels, pixels]))
    with pytest.raises(ValueError, match="names clips beyond the 1 given"):
        model(input_ids=ids, pixel_values_videos=pixels, video_index=torch.tensor([1]))
    for wrong in ((4, 3, 32), (4, 4, 31), (4, 32)):  # 4 patches of width 32 are right
        with pytest.raises(ValueError, match=r"video_features: shape .*, wanted \(any, 4, 32\)"):
            model(input_ids=ids, video_features=[torch.zeros(wrong)])
    short = ids[:, 1:] if ids[0, 0] == model.config.video_token_id else ids.clone()
    place = (short[0] == model.config.video_token_id).nonzero()[0]
    short[0, place] = 0
    with pytest.raises(ValueError, match="7 placeholders in a row, but 8 video tokens"):
        model(input_ids=short, pixel_values_videos=pixels)


@torch.no_grad()
def test_loss_of_a_padded_batch_is_the_mean_over_its_answer_tokens(tiny, clip_frames):
    model, processor = tiny
    rows = [row(processor, ASKED, 3), row(processor, [("<video>\nWhere?", "In a park, he is.")], 4)]
    clips = [processor.process_frames(clip_frames(3)), processor.process_frames(clip_frames(4))]
    losses, counts = [], []
    for encoded, clip in zip(rows, clips, strict=True):
        losses.append(model(**encoded, pixel_values_videos=clip[None]).loss)
        counts.append((encoded["labels"] != IGNORE_INDEX).sum())
    wanted = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    batch = pad(rows, processor.tokenizer.pad_token_id)
    assert model(**batch, pixel_values_videos=clips).loss.item() == pytest.approx(wanted.item())


# ---- generation -----------------------------------------------------------------------------


def test_generation_batched_alone_and_without_a_cache(tiny, clip_frames):
    model, processor = tiny
    text = prompts(processor, "<video>\nWhat is he doing in the park?", "Hi.", "<video>\nWhere?")
    clips = [clip_frames(4), None, clip_frames(3, seed=5)]
    settings = dict(max_new_tokens=12, do_sample=False)
    batch = processor(text=text, videos=clips)
    length = batch["input_ids"].shape[1]
    together = model.generate(**batch, **settings)[:, length:]
    assert torch.equal(model.generate(**batch, **settings, use_cache=False)[:, length:], together)
    features = [model.vision_features(clip) for clip in batch["pixel_values_videos"]]
    cached = {k: v for k, v in batch.items() if k != "pixel_values_videos"}
    cached = model.generate(**cached, video_features=features, **settings)[:, length:]
    assert torch.equal(cached, together)
    assert len({tuple(answer.tolist()) for answer in together}) == 3
    ends = model.generation_config.eos_token_id
    for k in range(3):
        alone = processor(text=text[k], videos=[clips[k]])
        answer = model.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(answer, together[k, : len(answer)])
        assert len(answer) == 12 or answer[-1] in ends
    assert model.config.video_token_id not in together


def test_an_answer_takes_one_token_a_pass_and_its_clips_are_encoded_once(tiny, clip_frames):
    model, processor = tiny
    batch = processor(text=prompts(processor, "<video>\nWhat is he doing?", "<video>\nWhere?"),
                      videos=[clip_frames(4), clip_frames(3, seed=5)])  # fmt: skip
    shapes, encoded = [], []
    model.language_model.register_forward_pre_hook(
        lambda _, args, given: shapes.append(given["inputs_embeds"].shape[:2]), with_kwargs=True)
    model.vision_encoder.embeddings.register_forward_pre_hook(
        lambda _, args: encoded.append(len(args[0])))
    model.generate(**batch, min_new_tokens=5, max_new_tokens=5, do_sample=False)
    assert shapes == [batch["input_ids"].shape, *[(2, 1)] * 4]
    assert encoded == [4 + 3]


def test_several_answers_keep_their_clips(tiny, clip_frames):
    model, processor = tiny
    text = prompts(processor, "<video>\nWhat?", "<video>\nWhat?", "<video>\nWhat?")
    one, two = clip_frames(4), clip_frames(4, seed=9)
    batch = processor(text=text, videos=[one, two, one])
    settings = dict(max_new_tokens=6, do_sample=False)
    single = model.generate(**batch, **settings)
    beams = model.generate(**batch, **settings, num_beams=2, num_return_sequences=2)
    torch.manual_seed(0)
    many = model.generate(**batch, max_new_tokens=6, do_sample=True, top_k=1,
                          num_return_sequences=3)  # fmt: skip
    assert torch.equal(many, single.repeat_interleave(3, 0))  # top 1 of 1: what greedy takes
    assert torch.equal(beams[:2], beams[4:]) and len(beams) == 6
    assert not torch.equal(single[0], single[1])  # the clip is seen


def test_a_placeholder_outside_the_vocabulary(build_tiny, clip_frames):
    model, processor = build_tiny()
    batch = processor(text=prompts(processor, "<video>\nWhat?"), videos=[clip_frames()])
    wanted = model(**batch).logits
    ids, old = batch["input_ids"], model.config.video_token_id
    model.config.video_token_id = model.config.text_config.vocab_size + 7
    ids[ids == old] = model.config.video_token_id
    assert torch.equal(model(**batch).logits, wanted)
    assert model.generate(**batch, max_new_tokens=3).shape[0] == 1


# ---- learning -------------------------------------------------------------------------------


def learn(model, processor, clip, **kwargs):
    model.zero_grad()
    encoded = row(processor, ASKED)
    pixels = processor.process_frames(clip)[None]
    model(**encoded, pixel_values_videos=pixels, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(tiny, clip_frames):
    model, processor = tiny
    model.train()
    plain = learn(model, processor, clip_frames())
    model.activation_checkpointing_enable()
    assert model.language_model.is_activation_checkpointing
    saved = learn(model, processor, clip_frames(), use_cache=False)
    assert plain.keys() == saved.keys()
    assert all(torch.allclose(plain[name], saved[name], atol=1e-6) for name in plain)
    model.vision_encoder.requires_grad_(False), model.language_model.requires_grad_(False)
    stage_one = learn(model, processor, clip_frames(), use_cache=False)
    assert stage_one.keys() == {name for name in plain if name.startswith("connector.")}
    assert all(torch.allclose(plain[name], stage_one[name], atol=1e-6) for name in stage_one)


def test_unseen_parameters_get_no_gradient(tiny, clip_frames):
    model, processor = tiny
    grads = learn(model.train(), processor, clip_frames())
    silent = {name for name, _ in model.named_parameters()} - grads.keys()
    assert {name.split(".")[1] for name in silent} == {"encoder", "post_layernorm", "head"}
    count = sum(p.numel() for name, p in model.named_parameters() if name in silent)
    assert count == count_parameters(model.config)["unseen"]


def test_text_alone_still_touches_the_connector(tiny):
    model, processor = tiny
    encoded = row(processor, [("Hi.", "Hello.")])
    wanted = model.eval()(**encoded).loss
    loss = model.train()(**encoded).loss
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item())
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.connector.parameters())


def test_a_clip_that_no_row_shows_weighs_nothing(tiny, clip_frames):
    model, processor = tiny
    pixels = processor.process_frames(clip_frames())[None]
    encoded = row(processor, [("Hi.", "Hello.")])
    loss = model.train()(**encoded, pixel_values_videos=pixels, video_index=torch.tensor([])).loss
    loss.backward()
    first = model.vision_encoder.embeddings.patch_embedding.weight
    assert first.grad is not None and first.grad.eq(0).all()


@pytest.mark.parametrize("name", ["linear", "mlp2x_gelu", "naive_resampler", "group_resampler"])
def test_every_connector_learns_in_the_model(name, build_tiny, clip_frames):
    model, processor = build_tiny(connector_type=name)
    assert processor.num_tokens(4) == (8 if "resampler" in name else 16)
    grads = learn(model.train(), processor, clip_frames())
    connector = [key for key, _ in model.named_parameters() if key.startswith("connector.")]
    assert all(key in grads and grads[key].abs().sum() > 0 for key in connector)


# ---- other backbones ------------------------------------------------------------------------


def test_a_clip_encoder_with_a_class_token(llm_dir, tmp_path, clip_frames):
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    config = CLIPConfig(vision_config=dict(**tower, image_size=16, patch_size=8),
                        text_config=dict(**tower, vocab_size=99))  # fmt: skip
    CLIPModel(config).save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(tmp_path)
    model, processor = build_model(tmp_path, llm_dir, connector_type="linear",
                                   drop_first_patch=True)  # fmt: skip
    assert processor.num_tokens(3) == 12  # 4 patches per frame, the class token dropped
    pixels = processor.process_frames(clip_frames(3))
    assert model.vision_features(pixels).shape == (3, 4, 32)


# ---- wrong folders --------------------------------------------------------------------------


def test_pictures_of_another_size_than_the_encoders_are_refused(vision_dir, llm_dir, tmp_path):
    folder = shutil.copytree(vision_dir, tmp_path / "vision")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 32, "width": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelFolderError, match="its pictures have 32 pixels .* made for 16"):
        build_model(folder, llm_dir)


@torch.no_grad()
def test_dinov2_is_shown_the_pictures_of_its_processor(llm_dir, tmp_path, clip_frames):
    """As published: positions for 518 pixels, pictures of 224; here 32 and 16."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    Dinov2Model(Dinov2Config(**sizes, image_size=32, patch_size=4)).save_pretrained(tmp_path / "d")
    BitImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(tmp_path / "d")
    built = build_model(tmp_path / "d", llm_dir, connector_type="linear", num_frames=2,
                        drop_first_patch=True)  # fmt: skip
    for part in built:
        part.save_pretrained(tmp_path / "whole")
    model, processor = load_model(tmp_path / "whole")
    batch = processor(text="<video>\nWhat?", videos=[clip_frames()])
    assert (batch["input_ids"] == model.config.video_token_id).sum() == 4 * 16
    assert torch.equal(model(**batch).logits, built[0](**batch).logits)


def test_wrong_folders_are_named(vision_dir, llm_dir, model_dir, tmp_path):
    with pytest.raises(ModelFolderError, match="llm_dir = .*nowhere: no such folder"):
        build_model(vision_dir, tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match="no config.json"):
        build_model(tmp_path, llm_dir)
    with pytest.raises(ModelFolderError, match="model_dir = .*'qwen2' model; a 'tlv' one"):
        load_model(llm_dir)
    with pytest.raises(ValueError, match="no field num_querys"):
        build_model(vision_dir, llm_dir, num_querys=3)
    with pytest.raises(ValueError, match="template 'vicuna' is unknown"):
        build_model(vision_dir, llm_dir, template="vicuna")
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelFolderError, match="broken: its weights do not load"):
        load_model(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="no \\*.safetensors"):
        load_model(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match="config.json is not readable"):
        load_model(broken)
    other = json.loads((vision_dir / "config.json").read_text())
    other["vision_config"]["num_hidden_layers"] = 5
    shutil.copytree(vision_dir, tmp_path / "deeper")
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(other))
    with pytest.raises(ModelFolderError, match="deeper: 32 weights are missing, such as"):
        load_vision_encoder(tmp_path / "deeper")


def test_config_round_trip(tmp_path):
    config = paper_config()
    config.save_pretrained(tmp_path)
    again = TlvConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.tie_word_embeddings and again.drop_first_patch and again.num_queries == 512


def test_a_saved_model_names_no_folder_of_the_machine(model_dir, llm_dir, vision_dir):
    for path in model_dir.glob("*.json"):
        text = path.read_text()
        assert str(llm_dir) not in text and str(vision_dir) not in text, path.name
