"""The pair that chooses frames: equal to the plain model, cached by content, clear refusals."""

import os
import signal

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tlv import selector as selector_module
from tlv import video_child
from tlv.mp4 import write_video
from tlv.pretrained import ModelFolderError
from tlv.selector import QueryError, load_selector
from tlv.video import VideoError, read_frames


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory, tokenizer):
    """A small random CLIP folder: texts and pictures meet in 24 dimensions, texts of 77 tokens."""
    torch.manual_seed(3)
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    end = tokenizer.eos_token_id
    config = CLIPConfig(
        vision_config=dict(**tower, image_size=16, patch_size=8), projection_dim=24,
        text_config=dict(**tower, vocab_size=320, max_position_embeddings=77, eos_token_id=end,
                         bos_token_id=end, pad_token_id=tokenizer.pad_token_id),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("clip")
    size = {"height": 16, "width": 16}
    CLIPModel(config).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def path(tmp_path, clip_frames):
    write_video(tmp_path / "clip.mp4", clip_frames(70), fps=8)
    return tmp_path / "clip.mp4"


@pytest.fixture(params=["siglip", "clip"])
def selector(request, pair_dir, clip_dir, tmp_path):
    found = load_selector(pair_dir if request.param == "siglip" else clip_dir)
    found.cache_dir = tmp_path / "cache"
    return found


def test_embeddings_are_the_models_own_and_of_length_one(selector, path):
    frames = read_frames(path)
    embeddings = selector.embed_clip(path, range(70))
    assert embeddings.shape == (70, selector.width) and embeddings.dtype == torch.float16
    assert torch.allclose(embeddings.float().norm(dim=1), torch.ones(70), atol=1e-3)
    pixels = selector.image_processor(images=list(frames[[0, 69]]), return_tensors="pt")
    with torch.no_grad():
        truth = selector.model.get_image_features(**pixels).pooler_output
    truth = truth / truth.norm(dim=1, keepdim=True)
    assert torch.allclose(embeddings[[0, 69]].float(), truth, atol=1e-3)


def test_text_and_picture_meet_as_in_the_models_forward_pass(selector, clip_frames):
    query, frames = "A red circle", clip_frames(3)
    limit = selector.model.config.text_config.max_position_embeddings
    text = selector.tokenizer(query, padding="max_length", max_length=limit, return_tensors="pt")
    if selector.model.config.model_type == "siglip":
        del text["attention_mask"]
    text.pop("token_type_ids", None)
    pixels = selector.image_processor(images=list(frames), return_tensors="pt")
    with torch.no_grad():
        out = selector.model(**text, **pixels)
    truth = (out.image_embeds @ out.text_embeds.T)[:, 0]
    found = selector.embed_frames(frames).float() @ selector.embed_text(query)
    assert torch.allclose(found, truth, atol=2e-3)


def test_a_clip_is_embedded_once_and_read_from_disk_after(selector, path, monkeypatch):
    first = selector.embed_clip(path, [0, 3, 5])
    monkeypatch.setattr(selector, "embed_frames", None)  # a second pass would fail
    assert selector.embed_clip(path, [0, 3, 5]).equal(first)
    moved = path.rename(path.with_name("other name.mp4"))
    assert selector.embed_clip(moved, [0, 3, 5]).equal(first)  # the bytes count, not the name


def test_a_clip_that_hangs_the_decoder_is_given_up(selector, path, monkeypatch):
    monkeypatch.setattr(selector_module, "FRAME_S", 0.3)
    monkeypatch.setattr(selector_module, "CHUNK", 8)
    plain = selector.embed_frames

    def embed(frames):  # behind the second chunk the decoder never answers
        if frames[0].tobytes() == second:
            os.kill(video_child.child()._process.pid, signal.SIGSTOP)
        return plain(frames)

    second = read_frames(path, [8]).tobytes()
    monkeypatch.setattr(selector, "embed_frames", embed)
    with pytest.raises(VideoError, match="decoding took over 0.3 s"):
        selector.embed_clip(path, range(70))
    monkeypatch.undo()
    assert len(selector.embed_clip(path, [0, 3])) == 2  # by a new child


def test_nothing_stale_is_read(selector, path, clip_frames):
    first = selector.embed_clip(path, [0, 3])
    assert not selector.embed_clip(path, [0, 4]).equal(first)
    with torch.no_grad():
        next(iter(selector.model.vision_model.parameters())).normal_()
    again = load_selector_with(selector)
    assert not again.embed_clip(path, [0, 3]).equal(first)
    write_video(path, clip_frames(70, seed=1), fps=8)
    assert not selector.embed_clip(path, [0, 3]).equal(first)


def load_selector_with(selector):
    """The same parts and cache, as a new process would have them."""
    again = type(selector)(selector.model, selector.image_processor, selector.tokenizer)
    again.cache_dir = selector.cache_dir
    return again


def test_a_torn_cache_file_cannot_arise(selector, path):
    selector.embed_clip(path, [0])
    files = [p.name for p in selector.cache_dir.iterdir()]
    assert len(files) == 1 and files[0].endswith(".safetensors")


def test_saved_and_loaded_it_says_the_same(selector, tmp_path, clip_frames):
    selector.save_pretrained(tmp_path / "again")
    again = load_selector(tmp_path / "again")
    assert again.embed_text("red").equal(selector.embed_text("red"))
    assert again.embed_frames(clip_frames(2)).equal(selector.embed_frames(clip_frames(2)))


def test_queries_that_cannot_be_embedded_say_why(selector):
    limit = selector.model.config.text_config.max_position_embeddings
    with pytest.raises(QueryError, match=f"text encoder reads {limit}: give the sample a shorter"):
        selector.embed_text("what is the red circle " * 30)
    with pytest.raises(QueryError, match="the query is empty"):
        selector.embed_text("  ")


def test_a_folder_that_is_no_pair_is_refused(llm_dir, tmp_path):
    with pytest.raises(ModelFolderError, match="a 'qwen2' model; an image-text pair is wanted"):
        load_selector(llm_dir)
    with pytest.raises(ModelFolderError, match="no such folder"):
        load_selector(tmp_path / "nowhere")


def test_a_picture_is_a_clip_of_one_frame(selector, tmp_path, clip_frames):
    from PIL import Image

    Image.fromarray(clip_frames(1)[0]).save(tmp_path / "p.png")
    assert selector.embed_clip(tmp_path / "p.png", np.zeros(1, dtype=int)).shape[0] == 1
