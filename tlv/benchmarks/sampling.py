"""Which frames a benchmark's own code looks at, where it is not what the model samples.

How many they are is the model's: `num_frames(num_total, fps)`, a function of a clip's number of
frames and its frame rate. Source: TinyLLaVA-Video's evaluation (arXiv 2501.15513).
"""

import numpy as np

from tlv.video import Clip, sample_indices_fps


def sixteen(num_total, fps) -> int:
    """What most published models look at, whatever the clip."""
    return 16


def frames_of(processor):
    """A model's own `num_frames`: as many of each clip, or so many a second up to a limit."""

    def num_frames(num_total, fps) -> int:
        if processor.sampling == "uniform":
            return processor.num_frames
        return len(sample_indices_fps(num_total, fps, processor.fps, processor.max_frames))

    return num_frames


def each_once(clip: Clip) -> np.ndarray:
    """A sampled clip's frames without repeats, (T, H, W, 3): Video-MME's and MLVU's.

    Training shows some frames of a short clip twice, so that there are always as many.
    """
    return clip.frames[np.unique(clip.indices, return_index=True)[1]]


def segment_midpoints(num_total, fps, num_frames=16, bound=None, first=0) -> np.ndarray:
    """MVBench's frames: near the middle of each of `num_frames` equal segments.

    `bound` (start, end) in seconds cuts the clip; `first` is the number of its first frame (1 for
    folders of frames).
    """
    start, end = bound or (-1e5, 1e5)
    low = max(first, round(start * fps))
    size = (min(round(end * fps), first + num_total - 1) - low) / num_frames
    return np.array([int(low + size / 2 + np.round(size * i)) for i in range(num_frames)])


def left_steps(duration, fps, max_frames=16) -> np.ndarray:
    """LongVideoBench's frames: one a second, at most `max_frames`, from the first on at a step.

    duration: seconds, as the annotation tells it, whatever the file holds.
    """
    num = max(1, min(max_frames, int(duration)))
    return np.arange(num) * int(int(duration * fps) / num)
