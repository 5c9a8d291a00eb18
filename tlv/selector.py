"""A CLIP or SigLIP pair that says which frames of a long clip a question is about.

Frames and question become vectors of one space, so that their cosines mean something. It is frozen
and stands beside the model: as a folder of its own, `selector/`, in the model's folder. The first
of the two passes over a long clip happens here; what it finds is kept on disk, for every later
question. Taught in notebook 06.
"""

import hashlib
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from tlv import ROOT
from tlv.files import write_bytes
from tlv.pretrained import ModelFolderError, load_part, load_pretrained, read_config
from tlv.video_child import read_chunks_within

CHUNK = 128  # frames decoded and embedded at once
FRAME_S = 60.0  # seconds after which a clip is given up, if its next frame is not decoded
# How a text enters each kind of pair. SigLIP reads its vector at the last place, so it is trained
# on texts padded to the full length, and without a mask.
TEXT_INPUTS = {"siglip": ("input_ids",), "clip": ("input_ids", "attention_mask")}
CACHE_DIR = ROOT / "outputs" / ".embeddings"


class QueryError(ValueError):
    """A query that cannot be embedded; says why, and what would be right."""


class Selector:
    """Embeds frames and questions; D is the width of their common space.

    Frame embeddings are kept below `cache_dir` (None: nowhere), by the clip's bytes, the pair's
    weights and the frames read, so that nothing stale is ever found.
    """

    def __init__(self, model, image_processor, tokenizer):
        self.model = model.eval().requires_grad_(False)
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.cache_dir: Path | None = CACHE_DIR
        self._texts = lru_cache(1024)(self._embed_text)  # a training asks the same words again

    @property
    def width(self) -> int:
        """D of the embeddings."""
        config = self.model.config
        return getattr(config, "projection_dim", None) or config.text_config.projection_size

    def embed_text(self, query: str) -> torch.Tensor:
        """A question or a few words of it -> (D,) float32 of length 1.

        Raises QueryError for a query without words or longer than the text encoder reads (77 tokens
        for CLIP, 64 for SigLIP): what is asked at its end would be lost.
        """
        return self._texts(query).clone()

    @torch.no_grad()
    def _embed_text(self, query: str) -> torch.Tensor:
        if not query.strip():
            raise QueryError("the query is empty; it must name what the question is about")
        limit = self.model.config.text_config.max_position_embeddings
        count = len(self.tokenizer(query).input_ids)
        if count > limit:
            raise QueryError(f"the query has {count} tokens, the text encoder reads {limit}: give "
                             f"the sample a shorter `query` of its own: {query[:60]!r}...")
        batch = self.tokenizer(query, padding="max_length", max_length=limit, return_tensors="pt")
        names = TEXT_INPUTS[self.model.config.model_type]
        inputs = {name: batch[name].to(self.model.device) for name in names}
        found = self.model.get_text_features(**inputs).pooler_output  # (1, D)
        return F.normalize(found.float(), dim=-1)[0].cpu()

    @torch.no_grad()
    def embed_frames(self, frames) -> torch.Tensor:
        """uint8 RGB (T, H, W, 3) -> (T, D) float16, of length 1 but for rounding, on the CPU."""
        pixels = self.image_processor(images=list(frames), return_tensors="pt").pixel_values
        pixels = pixels.to(self.model.device, self.model.dtype)  # (T, C, H', W')
        found = self.model.get_image_features(pixel_values=pixels).pooler_output  # (T, D)
        return F.normalize(found.float(), dim=-1).half().cpu()

    def embed_clip(self, path, numbers) -> torch.Tensor:
        """The frames `numbers` (T,) of a clip, ascending -> (T, D) float16.

        The first pass: decoded in order, CHUNK frames at a time; read from disk where it was done
        before. Raises VideoError, also for a clip that hangs the decoder.
        """
        file = self.cache_dir and Path(self.cache_dir) / f"{self._mark(path, numbers)}.safetensors"
        if file and file.is_file():
            with safe_open(file, "pt") as found:
                return found.get_tensor("frames")
        embeddings, done = torch.empty(len(numbers), self.width, dtype=torch.float16), 0  # (T, D)
        for frames in read_chunks_within(FRAME_S, path, numbers, CHUNK):
            embeddings[done : done + len(frames)] = self.embed_frames(frames)
            done += len(frames)
        if file:
            write_bytes(file, save({"frames": embeddings}))
        return embeddings

    def _mark(self, path, numbers) -> str:
        mark = hashlib.sha256(self._own_mark)
        mark.update(",".join(map(str, numbers)).encode())
        with open(path, "rb") as file:
            mark.update(hashlib.file_digest(file, "sha256").digest())
        return mark.hexdigest()[:32]

    @cached_property
    def _own_mark(self) -> bytes:
        """Of the weights, of how pixels are made, and of this file."""
        mark = hashlib.sha256(Path(__file__).read_bytes())
        mark.update(self.image_processor.to_json_string().encode())
        for name, weight in sorted(self.model.state_dict().items()):
            mark.update(name.encode())
            mark.update(weight.cpu().flatten().view(torch.uint8).numpy())
        return mark.digest()

    def save_pretrained(self, folder) -> None:
        """Write an ordinary Hugging Face folder of the pair."""
        for part in (self.model, self.image_processor, self.tokenizer):
            part.save_pretrained(folder)


def load_selector(path, what: str = "selector_dir") -> Selector:
    """The pair in a folder, such as openai/clip-vit-base-patch32 or the toy world's own.

    Raises ModelFolderError for a wrong folder, or a model that is no such pair.
    """
    check_pair(path, what)
    return Selector(load_pretrained(AutoModel, path, what),
                    load_part(AutoImageProcessor, path, what, backend="pil"),
                    load_part(AutoTokenizer, path, what))


def check_pair(path, what: str) -> None:
    """Refuse a folder whose model is no image-text pair."""
    kind = read_config(path, what).model_type
    if kind not in TEXT_INPUTS:
        raise ModelFolderError(f"{what} = {path}: a {kind!r} model; an image-text pair is wanted, "
                               f"one of {', '.join(TEXT_INPUTS)}")
