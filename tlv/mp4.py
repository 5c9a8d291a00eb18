"""Write clips as H.264 MP4: from frames, or from clips that are already encoded.

The same frames give the same bytes. Taught in notebooks 00 (frames) and 06 (clips in a row).
"""

import os
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tlv.video import VideoError


@contextmanager
def _draft(path: Path):
    """A container to write to, which gets its name when it is complete."""
    draft = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with av.open(str(draft), "w", format="mp4", options={"movflags": "faststart"}) as out:
            yield out
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_video(path, frames, fps, crf=18) -> None:
    """Write (T, H, W, 3) uint8 RGB frames as an H.264 MP4; the same frames give the same bytes.

    H and W must be even (4:2:0 colour). One thread, no dates in the file, renamed when complete.
    Taught in notebook 00.
    """
    frames, path = np.asarray(frames), Path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"{path}: frames must be (T, H, W, 3) uint8, T >= 1, "
                         f"not {frames.shape} {frames.dtype}")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"{path}: H.264 wants an even height and width, not {height} x {width}")
    with _draft(path) as out:
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        # x264's lookahead reads memory that it never wrote: with it, one clip in six differs
        # from run to run (x86-64, one thread). Without it the bytes are the same.
        quiet = "threads=1:lookahead-threads=1:sync-lookahead=0:rc-lookahead=0:mbtree=0"
        stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": quiet}
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def encoding_of(path) -> tuple:
    """What must be equal in clips that follow each other in a file. Taught in notebook 06."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        return (context.name, context.width, context.height, context.extradata,
                stream.average_rate, stream.time_base)


def join(path, paths) -> None:
    """Write clips one after the other as one H.264 MP4, packet by packet.

    They must be of one size, rate and encoder setting, as those of a toy world are. Raises
    VideoError for a clip that is not like the first. Taught in notebook 06.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    start, first, target = 0, None, None
    with _draft(path) as out:
        for piece in paths:
            if encoding_of(piece) != (first := first or encoding_of(piece)):
                raise VideoError(piece, f"cannot follow {paths[0]}: it was encoded otherwise")
            with av.open(str(piece)) as container:
                stream = container.streams.video[0]
                if target is None:
                    target = out.add_stream_from_template(stream)
                    target.time_base = stream.time_base
                for packet in container.demux(stream):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + start, packet.dts + start
                        packet.stream = target
                        out.mux(packet)
                start += round(stream.frames / stream.average_rate / stream.time_base)
