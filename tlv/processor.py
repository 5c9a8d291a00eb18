"""Text, clips and pictures -> what the model's forward and generate take. Saved beside the model.

Frames are fitted to the encoder's square (bicubic, PIL), divided by 255 and normalised as the
encoder's own image processor says. How they are fitted is the image mode: `square` squashes, `crop`
resizes and cuts the middle out as the image processor says, `pad` fills up with the mean colour
before. Taught in notebook 02.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from tlv.chat import tokenize, video_token_id
from tlv.keyframes import choose_keyframes, count_clip_tokens
from tlv.templates import VIDEO_TOKEN
from tlv.video import Clip, plan_frames
from tlv.video_child import sample_frames_within

SELECTOR = "selector"  # the folder of the image-text pair, below the model's


def _squash(frame: Image.Image, side: int, edge: int, colour) -> Image.Image:
    return frame.resize((side, side), Image.Resampling.BICUBIC)


def _pad(frame: Image.Image, side: int, edge: int, colour) -> Image.Image:
    longest = max(frame.size)
    canvas = Image.new("RGB", (longest, longest), colour)
    canvas.paste(frame, ((longest - frame.width) // 2, (longest - frame.height) // 2))
    return _crop(canvas, side, edge, colour)


def _crop(frame: Image.Image, side: int, edge: int, colour) -> Image.Image:
    shortest = min(frame.size)
    width, height = (int(edge * length / shortest) for length in frame.size)
    frame = frame.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return frame.crop((left, top, left + side, top + side))


IMAGE_MODES = {"square": _squash, "pad": _pad, "crop": _crop}


def picture_side(image_processor) -> int:
    """Height and width in pixels of the pictures that an image processor makes."""
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    return size.get("height") or size["shortest_edge"]


def shortest_edge(image_processor) -> int:
    """Pixels of a picture's shorter side before its middle is cut out: DINOv2 cuts 224 of 256."""
    return image_processor.size.get("shortest_edge") or picture_side(image_processor)


class TlvProcessor(ProcessorMixin):
    """An image processor, a tokenizer with `<video>`, and how many frames and tokens a clip has.

    A clip of T frames becomes tokens_per_clip + T * tokens_per_frame video tokens. With keyframes
    (connector vilamp) min(T, num_keyframes) of the frames have tokens_per_keyframe each instead;
    then `selector` says which.
    """

    selector = None

    # No argument may be called video_processor: it would be loaded through torchvision.
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_frames=16,
                 sampling="uniform", fps=1.0, max_frames=64, tokens_per_clip=0,
                 tokens_per_frame=0, image_mode="square", num_keyframes=0, tokens_per_keyframe=0,
                 selection="dks", keyframe_threshold=0.85):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if image_mode not in IMAGE_MODES:
            raise ValueError(f"image_mode {image_mode!r} is unknown; known are "
                             f"{', '.join(IMAGE_MODES)}")
        self.image_mode = image_mode
        self.num_frames, self.sampling, self.fps = num_frames, sampling, fps
        self.max_frames = max_frames
        self.tokens_per_clip, self.tokens_per_frame = tokens_per_clip, tokens_per_frame
        self.num_keyframes, self.tokens_per_keyframe = num_keyframes, tokens_per_keyframe
        self.selection, self.keyframe_threshold = selection, keyframe_threshold

    def to(self, device) -> "TlvProcessor":
        """Move the selector, the one part of a processor that computes on a device."""
        if self.selector is not None:
            self.selector.model.to(device)
        return self

    def num_tokens(self, num_frames: int) -> int:
        """Video tokens of a clip of `num_frames` frames."""
        return self.tokens_per_clip + count_clip_tokens(
            num_frames, self.num_keyframes, self.tokens_per_keyframe, self.tokens_per_frame
        )

    def save_pretrained(self, folder, **kwargs):
        """As every processor, and the selector beside it in `selector/`."""
        super().save_pretrained(folder, **kwargs)
        if self.selector is not None:
            self.selector.save_pretrained(Path(folder) / SELECTOR)

    def plan(self, path):
        """Numbers (T,) and seconds (T,) of the frames that `sample` reads. Raises VideoError."""
        return plan_frames(path, self.num_frames, self.sampling, self.fps, self.max_frames)

    def embed(self, path):
        """What the selector makes of the planned frames, (T, D_q) float16. Raises VideoError."""
        return self.selector.embed_clip(path, self.plan(path)[0])

    def choose(self, frames, query: str):
        """Embeddings (T, D_q) and a query -> its keyframes (K,) int64, its own embedding (D_q,).

        Raises QueryError for a query that the selector refuses. Taught in notebook 06.
        """
        vector = self.selector.embed_text(query)  # (D_q,)
        keyframes = choose_keyframes(self.selection, frames, vector, self.num_keyframes,
                                     self.keyframe_threshold)
        return keyframes, vector

    def select(self, path, query: str):
        """Which of the planned frames of a clip are keyframes: `choose` after `embed`."""
        return self.choose(self.embed(path), query)

    def look(self, path, query: str) -> dict:
        """What the model's forward wants to know of a clip beside its pixels.

        Keyframes and the query's embedding where the model chooses frames, else nothing.
        """
        if self.selector is None:
            return {}
        keyframes, vector = self.select(path, query)
        return {"keyframes": [keyframes], "queries": vector[None]}  # [(K,)], (1, D_q)

    def sample(self, path, timeout_s=None) -> Clip:
        """Read the frames of a clip that this model is made for. Raises VideoError."""
        return sample_frames_within(timeout_s, path, num_frames=self.num_frames,
                                    sampling=self.sampling, fps=self.fps,
                                    max_frames=self.max_frames)  # fmt: skip

    def process_frames(self, frames) -> torch.Tensor:
        """uint8 RGB (T, H, W, 3) -> float32 (T, C, H', W'), the encoder's input."""
        frames = np.asarray(frames)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(f"frames must be (T, H, W, 3) uint8, not {frames.shape} "
                             f"{frames.dtype}")
        fit, colour = IMAGE_MODES[self.image_mode], self._mean_colour()
        sides = self.side, shortest_edge(self.image_processor)
        fitted = [fit(Image.fromarray(frame), *sides, colour) for frame in frames]
        pixels = self.image_processor(
            images=fitted, do_resize=False, do_center_crop=False, return_tensors="pt"
        ).pixel_values
        return pixels.float()

    @property
    def side(self) -> int:
        """Height and width in pixels of what the encoder takes."""
        return picture_side(self.image_processor)

    def _mean_colour(self) -> tuple[int, ...]:
        return tuple(int(mean * 255) for mean in self.image_processor.image_mean)

    def __call__(self, images=None, text=None, videos=None, padding=True, padding_side="left",
                 add_special_tokens=True, return_tensors="pt", **others) -> BatchFeature:
        """Prompts and visuals -> input_ids, attention_mask, pixel_values_videos, video_index.

        text: a string or list of B, with one `<video>` for each visual of the row. videos, images:
        None, or per row None, a path, uint8 frames (T, H, W, 3) or (H, W, 3), or a list of at
        most one of these. A picture is a clip of one frame. Rows that name the same clip share it.
        """
        others = {key: value for key, value in others.items() if value is not None}
        if self.num_keyframes:
            raise TypeError("this model chooses frames by the question; ask it with tlv.ask or "
                            "tlv.long_video.generate")
        if others or return_tensors not in ("pt", None):
            raise TypeError(f"the processor gives torch tensors and takes no {sorted(others)}; how "
                            "frames are sampled is its own num_frames, sampling, fps, max_frames")
        texts = [text] if isinstance(text, str) else list(text)
        visuals = [[*video, *image]
                   for video, image in zip(_per_row(videos, len(texts), "videos"),
                                           _per_row(images, len(texts), "images"), strict=True)]
        clips, rows, video_index = {}, [], []
        for row, (prompt, found) in enumerate(zip(texts, visuals, strict=True)):
            num_places = prompt.count(VIDEO_TOKEN)
            if num_places != len(found) or num_places > 1:
                raise ValueError(f"row {row}: {num_places} {VIDEO_TOKEN} in its text, but "
                                 f"{len(found)} videos and images; at most one of each is right")
            num_tokens = 0
            for visual in found:
                key = str(visual) if isinstance(visual, str | Path) else id(visual)
                if key not in clips:
                    clips[key] = self.process_frames(self._read(visual))
                video_index.append(list(clips).index(key))
                num_tokens = self.num_tokens(len(clips[key]))
            rows.append(self._tokenize(prompt, num_tokens, add_special_tokens))
        batch = self.tokenizer.pad({"input_ids": rows}, padding=padding,
                                   padding_side=padding_side, return_tensors="pt")  # fmt: skip
        data = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if clips:
            data["pixel_values_videos"] = stack_equal(list(clips.values()))
            data["video_index"] = torch.tensor(video_index)
        return BatchFeature(data)

    def _read(self, visual) -> np.ndarray:
        """A path or frames -> (T, H, W, 3) uint8."""
        if isinstance(visual, str | Path):
            return self.sample(visual).frames
        frames = np.asarray(visual.convert("RGB") if isinstance(visual, Image.Image) else visual)
        return frames[None] if frames.ndim == 3 else frames

    def _tokenize(self, prompt, num_tokens, add_special_tokens) -> list[int]:
        ids, _ = tokenize(prompt, self.tokenizer, add_special_tokens)
        placeholder = video_token_id(self.tokenizer)
        return [i for token in ids for i in [token] * (num_tokens if token == placeholder else 1)]


def _per_row(visuals, num_rows, name) -> list[list]:
    """None, or one entry per row, each None, a visual or a list -> a list per row."""
    if visuals is None:
        return [[] for _ in range(num_rows)]
    if isinstance(visuals, str | Path | np.ndarray | Image.Image):
        visuals = [visuals]
    if len(visuals) != num_rows:
        raise ValueError(f"{len(visuals)} {name} for {num_rows} texts; give one per text, "
                         "None where a text has none")
    return [v if isinstance(v, list) else [] if v is None else [v] for v in visuals]


def stack_equal(clips: list[torch.Tensor]):
    """Clips of equal shape as one tensor (B, T, ...), others as the list they are."""
    is_equal = all(clip.shape == clips[0].shape for clip in clips)
    return torch.stack(clips) if is_equal else clips
