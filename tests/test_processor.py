"""Pixels, prompts and the chat template of the processor."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tlv.mp4 import write_video
from tlv.pretrained import load_part
from tlv.processor import IMAGE_MODES, TlvProcessor
from tlv.templates import render

PROMPT = "<video>\nWhat is he doing?"


@pytest.fixture
def processor(tiny):
    return tiny[1]


def test_golden_pixels(tokenizer):
    """Squashed to 384 x 384, bicubic, -1..1; numbers computed independently."""
    frame = np.random.RandomState(0).randint(0, 256, (120, 200, 3)).astype(np.uint8)
    image_processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    pixels = TlvProcessor(image_processor, tokenizer).process_frames(frame[None])
    assert pixels.shape == (1, 3, 384, 384) and pixels.dtype == torch.float32
    wanted = [0.38824, 0.45098, 0.6, 0.63137]
    assert pixels[0, 0, 0, :4].tolist() == pytest.approx(wanted, abs=1e-5)
    assert pixels.sum().item() == pytest.approx(1023.083, abs=0.05)
    small = Image.fromarray(frame).resize((384, 384), Image.Resampling.BICUBIC)
    by_hand = (torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255.0 - 0.5) / 0.5
    assert torch.allclose(pixels[0], by_hand, atol=1e-6)


CLIP = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
DINO = dict(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32})  # as 224 of 256


@pytest.mark.parametrize("shape", [(40, 56), (56, 40), (20, 31), (33, 33)])
def test_modes_equal_the_published_preprocessing(shape, tokenizer):
    """CLIP's and DINOv2's own processors crop, SigLIP's squashes; pad is TinyLLaVA's
    expand-to-square."""
    frame = np.random.RandomState(1).randint(0, 256, (*shape, 3)).astype(np.uint8)
    clip = CLIPImageProcessorPil(**CLIP)
    for theirs in (clip, BitImageProcessorPil(**DINO)):
        ours = TlvProcessor(theirs, tokenizer, image_mode="crop").process_frames(frame[None])
        assert torch.equal(ours, theirs(images=frame, return_tensors="pt").pixel_values)
    siglip = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    ours = TlvProcessor(siglip, tokenizer).process_frames(frame[None])
    assert torch.equal(ours, siglip(images=frame, return_tensors="pt").pixel_values)
    side = max(shape)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = [int(mean * 255) for mean in clip.image_mean]
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    canvas[top : top + shape[0], left : left + shape[1]] = frame
    for theirs in (clip, BitImageProcessorPil(**DINO, image_mean=clip.image_mean)):
        ours = TlvProcessor(theirs, tokenizer, image_mode="pad").process_frames(frame[None])
        assert torch.equal(ours, theirs(images=canvas, return_tensors="pt").pixel_values)


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.48, 0.2, 0.9)])  # SigLIP's; one per channel
@pytest.mark.parametrize("shape", [(41, 56), (56, 41), (20, 31), (33, 33)])
def test_pad_for_siglip_by_hand(shape, mean, tokenizer):
    """As the checkpoints of TinyLLaVABench were trained: 127 around the frame, then squashed."""
    frame = np.random.RandomState(2).randint(0, 256, (*shape, 3)).astype(np.uint8)
    (height, width), side = shape, max(shape)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = [int(value * 255) for value in mean]  # cut off, not rounded
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = frame
    small = np.array(Image.fromarray(canvas).resize((32, 32), Image.Resampling.BICUBIC))
    wanted = torch.from_numpy((small / 255 - mean) / 0.5).permute(2, 0, 1).float()  # (3, H, W)
    siglip = SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=mean)
    ours = TlvProcessor(siglip, tokenizer, image_mode="pad").process_frames(frame[None])
    assert ours.shape == (1, 3, 32, 32) and torch.allclose(ours[0], wanted, atol=1e-5)


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_clips_old_settings_name_a_side_by_one_number(mode, tmp_path, tokenizer):
    """As openai/clip-vit-large-patch14-336 has them; what is read is the form of today."""
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336},
                                 crop_size={"height": 336, "width": 336})  # fmt: skip
    old = dict(
        crop_size=336, do_center_crop=True, do_normalize=True, do_resize=True,
        feature_extractor_type="CLIPFeatureExtractor", image_mean=list(clip.image_mean),
        image_std=list(clip.image_std), resample=3, size=336,
    )  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    read = load_part(AutoImageProcessor, tmp_path, "vision_dir", backend="pil")
    frame = np.random.RandomState(3).randint(0, 256, (1, 40, 56, 3)).astype(np.uint8)
    ours, wanted = (TlvProcessor(p, tokenizer, image_mode=mode) for p in (read, clip))
    pixels = ours.process_frames(frame)
    assert ours.side == 336 and pixels.shape == (1, 3, 336, 336)
    assert torch.equal(pixels, wanted.process_frames(frame))


def test_an_unknown_image_mode_lists_the_known_ones(tokenizer):
    with pytest.raises(ValueError, match="'anyres' is unknown; known are square, pad, crop"):
        TlvProcessor(CLIPImageProcessorPil(**CLIP), tokenizer, image_mode="anyres")


def test_wrong_frames_are_refused(processor):
    for frames in (np.zeros((4, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="must be \\(T, H, W, 3\\) uint8, not"):
            processor.process_frames(frames)


def test_saved_and_loaded(processor, model_dir, clip_frames):
    again = AutoProcessor.from_pretrained(model_dir)
    assert isinstance(again, TlvProcessor)
    assert (again.num_frames, again.tokens_per_clip, again.tokens_per_frame) == (4, 8, 0)
    assert again.chat_template == processor.chat_template and again.tokenizer.pad_token == "<|pad|>"
    frames = clip_frames()
    assert torch.equal(again.process_frames(frames), processor.process_frames(frames))


def test_prompts_are_expanded_and_padded_on_the_left(processor, clip_frames):
    batch = processor(text=[PROMPT, "Hi."], videos=[clip_frames(), None])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    placeholder = processor.tokenizer.convert_tokens_to_ids("<video>")
    assert (ids == placeholder).sum(1).tolist() == [8, 0]
    assert batch["pixel_values_videos"].shape == (1, 4, 3, 16, 16)
    assert mask[1, 0] == 0 and mask[:, -1].all()
    assert ids[1, mask[1] == 1].tolist() == processor.tokenizer("Hi.").input_ids
    right = processor(text=[PROMPT, "Hi."], videos=[clip_frames(), None], padding_side="right")
    assert right["attention_mask"][1, -1] == 0


def test_clips_and_pictures_from_files(processor, clip_frames, tmp_path):
    write_video(tmp_path / "a.mp4", clip_frames(9), fps=3)
    Image.fromarray(clip_frames()[0]).save(tmp_path / "b.png")
    batch = processor(text=[PROMPT] * 3, videos=[tmp_path / "a.mp4", None, tmp_path / "a.mp4"],
                      images=[None, tmp_path / "b.png", None])  # fmt: skip
    assert batch["video_index"].tolist() == [0, 1, 0]
    assert [clip.shape[0] for clip in batch["pixel_values_videos"]] == [4, 1]
    clip = processor.sample(tmp_path / "a.mp4")
    assert clip.indices.tolist() == [0, 2, 5, 8]
    assert torch.equal(batch["pixel_values_videos"][0], processor.process_frames(clip.frames))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_one_picture_needs_no_list(mode, processor, clip_frames, tmp_path):
    Image.fromarray(clip_frames()[0]).convert(mode).save(tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as picture:
        batch = processor(text=[PROMPT], images=picture)
    listed = processor(text=[PROMPT], images=[tmp_path / "b.png"])
    assert torch.equal(batch["pixel_values_videos"], listed["pixel_values_videos"])


def test_visuals_must_fit_the_text(processor, clip_frames):
    with pytest.raises(ValueError, match="row 0: 1 <video> in its text, but 0 videos"):
        processor(text=[PROMPT])
    with pytest.raises(ValueError, match="row 1: 0 <video> in its text, but 1 videos"):
        processor(text=[PROMPT, "Hi."], videos=[clip_frames(), clip_frames()])
    with pytest.raises(ValueError, match="row 0: 1 <video> in its text, but 2 videos"):
        processor(text=[PROMPT], videos=[clip_frames()], images=[clip_frames()[0]])
    with pytest.raises(ValueError, match="1 videos for 2 texts"):
        processor(text=[PROMPT, "Hi."], videos=[clip_frames()])
    with pytest.raises(TypeError, match="takes no \\['num_frames'\\]"):
        processor(text=[PROMPT], videos=[clip_frames()], num_frames=8)


def test_chat_template(processor, clip_frames, tmp_path):
    """Messages through `apply_chat_template` give what `render` and a plain call give."""
    write_video(tmp_path / "a.mp4", clip_frames(6), fps=3)
    words = {"type": "text", "text": "What is he doing?"}
    asked = [{"role": "user",
              "content": [words, {"type": "video", "path": str(tmp_path / "a.mp4")}]}]  # fmt: skip
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert text == render([(PROMPT, None)], "qwen2_base")
    answered = [*asked, {"role": "assistant", "content": "Running."}]
    assert processor.apply_chat_template(answered) == render([(PROMPT, "Running.")], "qwen2_base")
    plain = processor(text=text, videos=[tmp_path / "a.mp4"])
    for conversation in (asked, [asked]):
        batch = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        assert torch.equal(batch["input_ids"], plain["input_ids"])
        assert torch.equal(batch["pixel_values_videos"], plain["pixel_values_videos"])
    with pytest.raises(Exception, match="role tool is unknown"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])
