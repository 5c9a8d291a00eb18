"""Small random backbones in the published Hugging Face form, and a model built from them."""

import os
import shutil

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tlv.backbones import train_tokenizer

torch.set_num_threads(1)

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives",
    "helpful, detailed, and polite answers to the user's questions. USER: What is he doing?",
    "ASSISTANT: Running. USER: Where? ASSISTANT: In a park. A red circle moves to the left.",
]


# Minutes each, longest first, so that two workers end at about the same time.
LONG = ("test_smoke_pipeline.py", "test_notebooks.py", "test_train.py", "test_pipeline.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 320 tokens with <|endoftext|>, ChatML's tokens and <video>."""
    return train_tokenizer(CORPUS, vocab_size=320)


@pytest.fixture(scope="session")
def vision_dir(tmp_path_factory):
    """A full SigLIP folder: 16 x 16 pixels, patch 8, width 32, 3 layers."""
    torch.manual_seed(1)
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    config = SiglipConfig(
        vision_config=dict(**tower, image_size=16, patch_size=8),
        text_config=dict(**tower, vocab_size=320, max_position_embeddings=16, projection_size=32),
    )
    path = tmp_path_factory.mktemp("vision")
    SiglipModel(config).save_pretrained(path)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pair_dir(tmp_path_factory, vision_dir, tokenizer):
    """The same SigLIP folder with a tokenizer, so that it can embed questions of 16 tokens."""
    path = tmp_path_factory.mktemp("pair") / "pair"
    shutil.copytree(vision_dir, path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory, tokenizer):
    """A Qwen2ForCausalLM folder: width 32, 2 layers, tied head."""
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llm")
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def build_tiny(vision_dir, llm_dir):
    """build_tiny(**config fields) -> (model, processor) of tiny size."""
    from tlv.builders import build_model

    def build(**changes):
        fields = dict(num_queries=8, num_groups=4, num_resampler_layers=1, resampler_heads=2,
                      resampler_head_dim=8, num_frames=4, max_seq_len=256)  # fmt: skip
        return build_model(vision_dir, llm_dir, **{**fields, **changes})

    return build


@pytest.fixture(scope="session")
def model_dir(build_tiny, tmp_path_factory):
    """A saved tiny model: group resampler, 8 video tokens of 4 frames."""
    path = tmp_path_factory.mktemp("model")
    for part in build_tiny():
        part.save_pretrained(path)
    return path


@pytest.fixture
def tiny(model_dir):
    """A fresh (model, processor) loaded from `model_dir`."""
    from tlv.builders import load_model

    return load_model(model_dir)


@pytest.fixture
def clip_frames():
    """clip_frames(num_frames, seed) -> (T, 20, 24, 3) uint8 noise."""

    def make(num_frames=4, seed=0):
        rng = np.random.default_rng(seed)
        return rng.integers(0, 256, (num_frames, 20, 24, 3), dtype=np.uint8)

    return make


@pytest.fixture
def fp16_here(monkeypatch):
    """DeepSpeed has fp16 on CPUs with instructions for it alone; torch has it, slowly, on all."""
    import deepspeed

    monkeypatch.setattr(deepspeed.get_accelerator(), "is_fp16_supported", lambda: True)
