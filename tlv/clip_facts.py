"""What the filters know of a clip, which is decoded once for all of them.

A large pool takes hours to decode, so what is known can be kept on disk until the stage is done.
Taught in notebook 01.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tlv import ROOT
from tlv.ahead import read_ahead
from tlv.files import write_bytes
from tlv.imports import modules_needed
from tlv.video import Clip, VideoError
from tlv.video_child import sample_frames_within

GRID = 16  # cells per side of a clip's signature


@dataclass(frozen=True)
class ClipFacts:
    """What the filters know of a clip; `error` says why it cannot be used, else it is empty."""

    error: str = ""
    duration: float = 0.0  # seconds
    signature: np.ndarray | None = None  # (T, GRID, GRID, 3) uint8: each sampled frame, tiny
    digest: str = ""  # equal for equal sampled frames
    embeddings: torch.Tensor | None = None  # (T', D), unit length, if a vision encoder was given


def inspect_clips(videos_dir, names, embed: Callable | None = None, num_frames: int = 16,
                  timeout_s=None, progress: Callable = iter, num_readers: int = 1,
                  kept: "KeptFacts | None" = None) -> dict[str, ClipFacts]:  # fmt: skip
    """Decode `num_frames` frames of each clip, first and last among them, and keep the facts.

    embed: frames (T, H, W, 3) uint8 -> unit vectors (T', D); see `filters.frame_embedder`.
    `progress` wraps the names (tqdm). A clip that cannot be decoded gives facts with `error` set.
    `num_readers` clips are decoded at a time, beside the encoder. A clip whose facts are in `kept`
    is not decoded, any other's are put there. Notebook 01.
    """

    def read(name):
        path = Path(videos_dir) / name
        file = kept and kept.file_of(path, num_frames, with_embeddings=embed is not None)
        if file and (known := load_facts(file)):
            return known, None, None
        clip = sample_frames_within(timeout_s, path, num_frames=num_frames)
        return _facts(clip), embed and clip.frames, file

    found = {}
    for name, seen in zip(progress(names), read_ahead(read, names, num_readers), strict=True):
        if isinstance(seen, VideoError):
            found[name] = ClipFacts(error=seen.reason)
            continue
        found[name], frames, file = seen
        if frames is not None:
            found[name] = replace(found[name], embeddings=embed(frames))
        if file:
            save_facts(found[name], file)
    return found


def _facts(clip: Clip) -> ClipFacts:
    digest = hashlib.sha256(repr((clip.num_frames_total, clip.frames.shape)).encode())
    digest.update(np.ascontiguousarray(clip.frames))
    return ClipFacts("", clip.duration, _shrink(clip.frames), digest.hexdigest())


def _shrink(frames: np.ndarray) -> np.ndarray:
    """Mean colour of each cell of a GRID x GRID raster: (T, H, W, 3) -> (T, GRID, GRID, 3)."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    cells = F.adaptive_avg_pool2d(pixels, GRID).permute(0, 2, 3, 1)  # (T, GRID, GRID, 3)
    return cells.round().to(torch.uint8).numpy()


# ---- on disk --------------------------------------------------------------------------------


class KeptFacts:
    """A folder of facts, a file for each clip: what a stopped run decoded, the next need not.

    Files are found by the clip's bytes, below a mark of the encoder's folder and of the code, so
    that nothing stale is found; those of other marks are removed. Facts of clips that cannot be
    decoded are not kept: a machine may have been busy. About 12 KB a clip, and its embeddings.
    """

    def __init__(self, root, encoder_dir):
        files = [p for p in sorted(Path(encoder_dir).rglob("*")) if p.is_file()]
        files += [ROOT / name for name in modules_needed("import tlv.filters", ROOT)]
        mark = hashlib.sha256(f"torch {torch.__version__}".encode())
        for path in files:
            mark.update(_hash_file(path))
        self.folder = Path(root) / mark.hexdigest()[:16] / "clips"
        for other in Path(root).glob("*/clips"):
            if other != self.folder:
                shutil.rmtree(other.parent)

    def file_of(self, path, num_frames: int, with_embeddings: bool) -> Path | None:
        """Where the facts of a clip are or will be; None for a clip that cannot be read."""
        try:
            mark = hashlib.sha256(_hash_file(path))
        except OSError:
            return None
        mark.update(f"{num_frames} {with_embeddings}".encode())
        return self.folder / f"{mark.hexdigest()[:32]}.safetensors"


def _hash_file(path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def save_facts(facts: ClipFacts, file: Path) -> None:
    """Write the facts of a clip that could be decoded."""
    tensors = {"signature": torch.from_numpy(facts.signature)}
    if facts.embeddings is not None:
        tensors["embeddings"] = facts.embeddings.contiguous()
    rest = json.dumps({"duration": facts.duration, "digest": facts.digest})
    write_bytes(file, save(tensors, {"facts": rest}))


def load_facts(file: Path) -> ClipFacts | None:
    """The facts in a file; None where there is none, or one that a power failure tore."""
    try:
        with safe_open(file, "pt") as found:
            tensors = {name: found.get_tensor(name) for name in found.keys()}
            rest = json.loads(found.metadata()["facts"])
    except (FileNotFoundError, SafetensorError):
        return None
    return ClipFacts(signature=tensors["signature"].numpy(),
                     embeddings=tensors.get("embeddings"), **rest)
