"""Which frames a benchmark's own code looks at, where it is not what the model samples.

Source: TinyLLaVA-Video's evaluation (arXiv 2501.15513).
"""

import numpy as np


def segment_midpoints(num_total, fps, num_frames=16, bound=None, first=0) -> np.ndarray:
    """MVBench's frames: near the middle of each of `num_frames` equal segments.

    `bound` (start, end) in seconds cuts the clip; `first` is the number of its first frame (1 for
    folders of frames).
    """
    start, end = bound or (-1e5, 1e5)
    low = max(first, round(start * fps))
    size = (min(round(end * fps), first + num_total - 1) - low) / num_frames
    return np.array([int(low + size / 2 + np.round(size * i)) for i in range(num_frames)])


def left_steps(num_total, fps, max_frames=16) -> np.ndarray:
    """LongVideoBench's frames: one a second, at most `max_frames`, from the first on at a step."""
    num = max(1, int(min(max_frames, int(num_total / fps))))
    return np.arange(num) * int(num_total / num)
