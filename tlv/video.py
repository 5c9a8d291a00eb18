"""Read clips: only the frames that are needed, with their times, from any common codec.

PyAV lists what a file holds without decoding (so times are exact at a variable frame rate). decord
decodes (one thread, it seeks to what is asked); PyAV, which brings a newer FFmpeg, decodes what
decord cannot, and long clips from end to end. Where both can, their pixels are equal. Every failure
is a `VideoError`.
Frame numbers count frames in the order they are shown; times are seconds, as stored in the file.
Taught in notebooks 02 (sampling) and 06 (long clips).
"""

import bisect
import math
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

# Where decord 0.6 was seen to give the right frames. Elsewhere it fails (AV1) or, worse, gives a
# neighbour of the frame asked for (AVI, MPEG-TS, MPEG-4 part 2, the last frames of open GOPs).
DECORD_CODECS = ("h264", "hevc", "vp8", "vp9")
DECORD_CONTAINERS = ("mp4", "matroska")


class VideoError(ValueError):
    """A clip that cannot be used: `path`, and `reason` (what is wrong and what would be right)."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self):  # so that it crosses from a data-loading worker whole
        return VideoError, (self.path, self.reason)


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds; width and height in pixels as shown (rotation applied)."""

    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    codec: str


@dataclass(frozen=True)
class Clip:
    """Frames sampled from a clip, and where in it they stand."""

    frames: np.ndarray  # (T, H, W, 3) uint8, RGB
    indices: np.ndarray  # (T,) int, frame numbers in the file
    timestamps: np.ndarray  # (T,) float, seconds
    num_frames_total: int
    fps: float
    duration: float  # seconds


# ---- which frames ---------------------------------------------------------------------------


def sample_indices(num_total: int, num_frames: int) -> np.ndarray:
    """`num_frames` frame numbers, evenly spaced from the first to the last frame of `num_total`.

    A clip with fewer frames gives some of them twice, so that the length is always (T,).
    Source: TinyLLaVA-Video's training code. Notebook 02.
    """
    if num_total < 1 or num_frames < 1:
        raise ValueError(f"num_total = {num_total}, num_frames = {num_frames}: both must be >= 1")
    return np.linspace(0, num_total - 1, num_frames, dtype=int)


def sample_indices_fps(num_total: int, native_fps: float, fps: float, max_frames: int):
    """`fps` frames per second of the whole clip, evenly spaced: at least 1, at most `max_frames`.

    One frame per full 1/fps s: a clip of 10.9 s at fps = 1 gives 10. Never more than there are.
    """
    for name, value in (("native_fps", native_fps), ("fps", fps), ("max_frames", max_frames)):
        if value <= 0:
            raise ValueError(f"{name} = {value}: must be > 0")
    wanted = math.floor(num_total / native_fps * fps + 1e-6)
    return sample_indices(num_total, max(1, min(wanted, max_frames, num_total)))


def _choose(num_total, native_fps, num_frames, sampling, fps, max_frames) -> np.ndarray:
    if sampling == "uniform":
        return sample_indices(num_total, num_frames)
    if sampling == "fps":
        return sample_indices_fps(num_total, native_fps, fps, max_frames)
    raise ValueError(f"sampling = {sampling!r}: must be 'uniform' or 'fps'")


# ---- what a file holds: every packet is listed, nothing is decoded --------------------------


@dataclass(frozen=True)
class _Index:
    pts: list[int]  # when each frame is shown, ascending, in ticks of time_base seconds
    keys: list[int]  # the same for the frames that decoding can start at
    time_base: float
    fps: float
    codec: str
    container: str
    is_closed: bool  # decoding may really start at each of `keys` (H.264: they are all IDR frames)

    def seconds(self, numbers) -> np.ndarray:
        return np.round([self.pts[i] * self.time_base for i in numbers], 6)  # (T,)

    def keyframe(self, pts: int) -> int:
        """The position in `keys` of the keyframe from which the frame at `pts` decodes."""
        return max(0, bisect.bisect_right(self.keys, pts) - 1)


def _index(path) -> _Index:
    pts, keys, is_closed = [], [], True
    with _open(path) as container:
        stream = container.streams.best("video")
        if stream.codec_context is None or stream.time_base is None:
            raise VideoError(path, "of an unknown codec; re-encode it as H.264")
        promised, rate, time_base = stream.frames, stream.average_rate, float(stream.time_base)
        codec, kind = stream.codec_context.name, container.format.name
        try:
            for packet in container.demux(stream):  # one at a time: together they are the file
                if not packet.size or packet.is_discard:
                    continue
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
                    is_closed &= codec != "h264" or _is_idr(bytes(packet))
        except av.FFmpegError as error:
            raise VideoError(path, f"damaged: {_brief(error)}; copy it again") from error
    if not pts or None in pts:
        raise VideoError(path, "its frames carry no times; remux it with ffmpeg first")
    if not keys:
        raise VideoError(path, "no frame that decoding could start at; re-encode it")
    if promised > len(pts):
        raise VideoError(path, f"truncated: its header promises {promised} frames, the file holds "
                               f"{len(pts)}; copy it again")
    pts.sort()
    span = (pts[-1] - pts[0]) * time_base
    fps = float(rate) if rate else (len(pts) - 1) / span if span > 0 else 1.0
    return _Index(pts, sorted(keys), time_base, fps, codec, kind, is_closed)


def _is_idr(data: bytes) -> bool:
    """Does an H.264 packet (4 bytes of length before each unit) hold an IDR slice (type 5)?"""
    start = 0
    while start + 4 < len(data):
        if data[start + 4] & 31 == 5:
            return True
        start += 4 + int.from_bytes(data[start : start + 4], "big")
    return False


def _open(path):
    """Open a file with PyAV after the checks that give the clearest messages."""
    path = Path(path)
    if not path.is_file():
        raise VideoError(path, "no such file; check the annotation's name and videos_dir")
    if path.stat().st_size == 0:
        raise VideoError(path, "the file is empty (0 bytes); copy it again")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(path, f"not a readable video: {_brief(error)}") from error
    if not container.streams.video:
        container.close()
        raise VideoError(path, "it holds no video stream (only sound?)")
    return container


def _brief(error) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


# ---- two decoders: distinct ascending frame numbers -> frames (T, H, W, 3) uint8 -------------


def _decode_with_decord(path, index: _Index, numbers) -> np.ndarray:
    import decord  # only here: PyAV alone serves machines that decord has no wheel for

    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(str(path), num_threads=1)
    if len(reader) != len(index.pts):
        raise VideoError(path, f"decord counts {len(reader)} frames, PyAV {len(index.pts)}")
    return reader.get_batch(list(numbers)).asnumpy()


def _decode_with_pyav(path, index: _Index, numbers):
    """Yields (H, W, 3), one frame at a time. Raises VideoError where none decodes.

    Seeks to the keyframe before each frame; where that fails (MPEG-TS), reads from the start.
    """
    wanted, shape = [index.pts[i] for i in numbers], None
    try:
        for can_seek in (True, False):
            for image in _frames_at(path, index, list(wanted), can_seek):
                if image.shape != (shape := shape or image.shape):
                    raise VideoError(path, f"its frames change size, from {shape[1]}x{shape[0]} to "
                                           f"{image.shape[1]}x{image.shape[0]}; re-encode it")
                del wanted[0]
                yield image
    except av.FFmpegError as error:
        reason = f"damaged, it opens but does not decode: {_brief(error)}"
        raise VideoError(path, reason) from error
    if wanted:
        seconds = wanted[0] * index.time_base
        raise VideoError(path, f"damaged: no frame decodes at {seconds:.3f} s; copy it again")


def _frames_at(path, index: _Index, wanted, can_seek: bool):
    """The frames shown at the times `wanted` (ticks), up to the first that is not found."""
    shown, to_rgb = None, VideoReformatter()  # one for all frames: to make one is most of the time
    with _open(path) as container:
        stream = container.streams.best("video")
        # Most files have one slice a frame, so that threads, one for each slice, would only wait.
        stream.codec_context.thread_count = 1
        decoded = container.decode(stream)
        for pts in wanted:
            if can_seek and (shown is None or index.keyframe(pts) > index.keyframe(shown)):
                container.seek(index.keys[index.keyframe(pts)], stream=stream)
                decoded = container.decode(stream)
            frame = next((f for f in decoded if f.pts == pts), None)
            if frame is None:
                break
            image = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
            yield np.rot90(image, frame.rotation // 90)  # as the file says it is shown
            shown = pts


def _decode(path, index: _Index, numbers) -> np.ndarray:
    """decord where it is right, else PyAV."""
    is_safe = index.is_closed and index.codec in DECORD_CODECS
    if is_safe and any(name in index.container for name in DECORD_CONTAINERS):
        try:
            return _decode_with_decord(path, index, numbers)
        except Exception:  # decord's own error is a bare Exception; PyAV says what is wrong
            pass
    return np.stack(list(_decode_with_pyav(path, index, numbers)))


def _read(path, choose) -> Clip:
    """Read the frames that `choose(num_frames, fps)` names; any order, repeats allowed."""
    index = _index(path)
    total = len(index.pts)
    indices = np.asarray(choose(total, index.fps), dtype=int)  # (T,)
    _check_numbers(path, indices, total)
    numbers, places = np.unique(indices, return_inverse=True)
    frames = _decode(path, index, numbers)[places]
    return Clip(frames, indices, index.seconds(indices), total, index.fps, total / index.fps)


def _check_numbers(path, indices, total):
    bad = indices[(indices < 0) | (indices >= total)]
    if bad.size:
        raise VideoError(path, f"frame {bad[0]} was asked for, it has frames 0 to {total - 1}")


# ---- the public readers ---------------------------------------------------------------------


def probe(path) -> VideoInfo:
    """Count frames and read sizes and times, decoding the first frame only."""
    index = _index(path)
    height, width = _decode(path, index, [0]).shape[1:3]
    total = len(index.pts)
    return VideoInfo(total, index.fps, total / index.fps, width, height, index.codec)


def read_frames(path, indices=None) -> np.ndarray:
    """The frames numbered `indices` (None: all), in that order -> (T, H, W, 3) uint8 RGB."""
    return _read(path, lambda total, fps: range(total) if indices is None else indices).frames


def read_chunks(path, indices, size: int = 64):
    """The frames numbered `indices` (ascending, each once), read in order and `size` at a time.

    Yields (n, H, W, 3) uint8 RGB, n <= size; beside the caller's chunk only the next is in memory.
    Raises VideoError, for a file that is damaged further on when that place is reached.
    Notebook 06.
    """
    if is_picture(path):
        yield read_image(path)
        return
    index, indices = _index(path), np.asarray(indices, dtype=int)
    if (np.diff(indices) <= 0).any():
        raise ValueError("indices must be ascending, each one once")
    _check_numbers(path, indices, len(index.pts))
    # PyAV alone: decord is no faster in a row, and holds frames of its own, more and more at first.
    frames = _decode_with_pyav(path, index, indices)
    for start in range(0, len(indices), size):
        first = next(frames)
        chunk = np.empty((min(size, len(indices) - start), *first.shape), np.uint8)  # (n, H, W, 3)
        chunk[0] = first
        for place in range(1, len(chunk)):
            chunk[place] = next(frames)
        yield chunk


def plan_frames(path, num_frames=16, sampling="uniform", fps=1.0, max_frames=64):
    """Which frames `sample_frames` reads, each once -> their numbers (T,) and seconds (T,).

    Nothing is decoded. A clip shorter than `num_frames` gives all its frames. Notebook 06.
    """
    if is_picture(path):
        return np.zeros(1, dtype=int), np.zeros(1)
    index = _index(path)
    chosen = _choose(len(index.pts), index.fps, num_frames, sampling, fps, max_frames)
    numbers = np.unique(chosen)  # (T,)
    return numbers, index.seconds(numbers)


def sample_frames(path, num_frames=16, sampling="uniform", fps=1.0, max_frames=64) -> Clip:
    """Sample a clip: `num_frames` evenly ("uniform"), or `fps` per second capped at `max_frames`.

    A picture is a clip of one frame, however many are asked for. Raises VideoError, and ValueError
    for a wrong request. `tlv.video_child` does the same with a limit of time.
    """
    if is_picture(path):
        frames = read_image(path)  # (1, H, W, 3)
        return Clip(frames, np.zeros(1, dtype=int), np.zeros(1), 1, 0.0, 0.0)

    def choose(total, native_fps):
        return _choose(total, native_fps, num_frames, sampling, fps, max_frames)

    choose(1, 1.0)  # a wrong request is not the clip's fault
    return _read(path, choose)


def is_picture(path) -> bool:
    """By the ending of its name, as web data has it."""
    return Path(path).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_image(path) -> np.ndarray:
    """A picture as a clip of one frame -> (1, H, W, 3) uint8 RGB, camera rotation applied."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(path, f"not a readable picture: {_brief(error)}") from error
