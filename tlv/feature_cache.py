"""Features of a frozen vision encoder, computed once and kept in memory.

Taught in notebooks 03 and 04.
"""

from pathlib import Path

import torch

from tlv.ahead import read_ahead
from tlv.video import VideoError


class FeatureCache:
    """What the frozen vision encoder makes of each clip, (T, N, D_v), kept in memory.

    Filled before training, with the encoder in the precision of training: the losses are those
    without a cache. A clip that cannot be read keeps its error, which is raised when asked for.
    """

    def __init__(self, device, dtype):
        self._device, self._dtype = device, dtype
        self._found: dict[Path, torch.Tensor | VideoError] = {}
        self.embeddings: dict[Path, torch.Tensor] = {}  # of the selector, where there is one

    def fill(self, model, dataset, indices, progress=iter, ranks=None) -> None:
        """Decode and encode the clips of the samples `indices` of a VideoTextDataset, each once.

        Of several ranks, all of which must ask for the same, each encodes its share for all. The
        model is not kept: a cache outlives it.
        """
        encoder = model.vision_encoder.to(self._device, self._dtype).eval()
        encoder.requires_grad_(False)
        samples = [dataset.samples[index] for index in sorted(set(indices))]
        paths = dict.fromkeys(path for sample in samples for path in _paths(dataset, sample))
        todo = [path for path in paths if path not in self._found]
        mine = todo if ranks is None else todo[ranks.rank :: ranks.world_size]
        found, embeddings = {}, {}
        for path, clip in zip(progress(mine), read_ahead(dataset.read, mine), strict=True):
            found[path], embeddings[path] = self._encode(model, dataset, path, clip)
        for theirs in [(found, embeddings)] if ranks is None else ranks.gather((found, embeddings)):
            self._found |= theirs[0]
            self.embeddings |= theirs[1]

    def _encode(self, model, dataset, path, clip):
        """Pixels (T, C, H, W) -> features (T, N, D_v), and the selector's (T, D_q) or None.

        A VideoError stays one.
        """
        if isinstance(clip, VideoError):
            return clip, None
        embedding = None
        try:
            if dataset.processor.selector is not None:
                embedding = dataset.processor.embed(path)
        except VideoError as error:  # the selector reads the whole clip, not some frames
            return error, None
        with torch.no_grad():
            pixels = clip.to(self._device, self._dtype)  # (T, C, H, W)
            return model.vision_features(pixels).cpu(), embedding  # (T, N, D_v)

    def __getitem__(self, path: Path) -> torch.Tensor:
        found = self._found[path]
        if isinstance(found, VideoError):
            raise found
        return found

    def __len__(self):
        return len(self._found)


def _paths(dataset, sample) -> list[Path]:
    try:
        return dataset.paths(sample) if isinstance(sample, dict) else []
    except VideoError:
        return []
