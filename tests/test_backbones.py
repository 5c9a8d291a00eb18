"""The tiny backbones: their loss, their captions, and folders that load like published ones."""

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tlv import backbones, questions, world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("backbones")
    losses = backbones.train_backbones(
        out, seed=0, vision_steps=2, llm_steps=2, num_texts=60, vision_width=32,
        vision_layers=2, llm_width=32, llm_layers=2, batch_size=8,
    )  # fmt: skip
    assert len(losses["vision"]) == len(losses["llm"]) == 2
    return out


def test_siglip_loss_equals_the_sum_over_pairs():
    torch.manual_seed(0)
    image, text = torch.randn(3, 4), torch.randn(5, 4)  # more captions than images
    same = torch.rand(5, 3) > 0.6
    by_hand = 0.0
    for j in range(5):
        for i in range(3):
            logit = 2.0 * float(text[j] @ image[i]) - 1.0
            by_hand += np.log1p(np.exp(-logit if same[j, i] else logit)) / 3
    loss = backbones.siglip_loss(image, text, torch.tensor(2.0).log(), torch.tensor(-1.0), same)
    assert float(loss) == pytest.approx(by_hand, rel=1e-5)


def test_captions_are_true_of_the_frames_that_show_them():
    facts = [[("small", "red", "ring", "top")], [("large", "red", "bar", "left")], []]
    captions, truth = backbones.write_captions(facts)
    rows = dict(zip(captions, truth.tolist(), strict=True))
    assert rows["small red ring top"] == [True, False, False]
    assert rows["nothing"] == [False, False, True]
    assert rows["red"] == [True, True, False]
    assert rows["top"] == [True, False, False] and rows["top left"] == [False, False, False]


def test_the_corpora_hold_no_held_out_pair():
    rng = np.random.default_rng(0)
    _, facts = backbones.write_frames(rng, 300)
    shown = {(colour, shape) for one in facts for _, colour, shape, _ in one}
    texts = [q + a for i in range(400) for q, a in backbones.write_lesson(rng, i / 400)]
    for colour, shape in world.HELD_OUT_PAIRS:
        assert (colour, shape) not in shown
        assert not any(f"{colour} {shape}" in text for text in texts)


def test_the_longest_caption_fits_into_the_text_tower(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "vision")
    longest = questions.frame_caption([("large", "purple", "circle", "bottom right")] * 3)
    assert len(tokenizer(longest).input_ids) <= backbones.TEXT_LENGTH


def test_training_frames_are_processed_as_the_saved_processor_does(folder):
    frames, _ = backbones.write_frames(np.random.default_rng(0), 4)
    processor = AutoImageProcessor.from_pretrained(folder / "vision")
    saved = processor(images=list(frames), return_tensors="pt").pixel_values
    assert torch.allclose(backbones.to_pixels(frames), saved, atol=1e-6)


def test_equal_seeds_give_equal_weights(folder, tmp_path):
    backbones.train_backbones(
        tmp_path, seed=0, vision_steps=2, llm_steps=2, num_texts=60, vision_width=32,
        vision_layers=2, llm_width=32, llm_layers=2, batch_size=8,
    )  # fmt: skip
    for name in ("vision/model.safetensors", "llm/model.safetensors", "llm/tokenizer.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_folders_load_through_the_auto_classes_and_can_be_measured(folder):
    encoder = AutoModel.from_pretrained(folder / "vision")
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    assert encoder.config.model_type == "siglip" and llm.config.model_type == "qwen2"
    found = backbones.measure_retrieval(encoder, tokenizer, seed=0, num_images=8)
    assert 0 <= found["top1"] <= found["top5"] <= 1
    read = backbones.measure_reading(llm, tokenizer, "plain", seed=0, num_scenes=6)
    assert set(read) <= set(questions.TYPES) and "count" in read
