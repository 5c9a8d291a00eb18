"""Decoding and sampling: the right frames, the right times, one clear error for each bad file."""

import os
import pickle
import signal
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import decord
import numpy as np
import pytest
from PIL import Image

from tlv import ROOT, video, video_child, world
from tlv.mp4 import write_video
from tlv.video import VideoError
from tlv.video_child import read_chunks_within, sample_frames_within

DECODERS = (video._decode_with_decord, video._decode_with_pyav)
REAL_CLIPS = Path(ROOT).parent / "shared" / "videos"


def real_clip(name):
    if not (REAL_CLIPS / name).exists():
        pytest.skip(f"needs {REAL_CLIPS / name}: public test clips are not part of this repository")
    return REAL_CLIPS / name


def numbered_frames(num_frames, height=48, width=64):
    """Frames whose left half holds their own number in eight black or white stripes."""
    frames = np.full((num_frames, height, width, 3), 90, np.uint8)
    for t in range(num_frames):
        for bit in range(8):
            rows = slice(bit * height // 8, (bit + 1) * height // 8)
            frames[t, rows, : width // 2] = 255 * (t >> bit & 1)
        frames[t, :, width // 2 :, t % 3] = 200
    return frames


def numbers(frames):
    """Read the frame numbers back -> list of int."""
    stripes = frames[:, :, : frames.shape[2] // 2].mean(axis=(2, 3)) > 127  # (T, H)
    rows = (np.arange(8) * 2 + 1) * frames.shape[1] // 16
    return [int(sum(int(on) << bit for bit, on in enumerate(line[rows]))) for line in stripes]


def encode(path, frames, codec="libx264", ticks=None, format=None, **options):
    """Write frames with PyAV; `ticks` are presentation times in 1/1000 s (variable rate)."""
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {name: str(value) for name, value in options.items()}
        if ticks is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for t, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = int(ticks[t]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def decode_both(path, indices):
    """The same frames through decord and through PyAV."""
    index = video._index(path)
    return [np.stack(list(decode(path, index, indices))) for decode in DECODERS]


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "sixty.mp4"
    write_video(path, numbered_frames(60), fps=8)
    return path


# ---- which frames ---------------------------------------------------------------------------


def test_uniform_sampling_gives_the_published_indices():
    assert video.sample_indices(300, 16).tolist() == [
        0, 19, 39, 59, 79, 99, 119, 139, 159, 179, 199, 219, 239, 259, 279, 299]  # fmt: skip
    assert video.sample_indices(360, 16).tolist() == [
        0, 23, 47, 71, 95, 119, 143, 167, 191, 215, 239, 263, 287, 311, 335, 359]  # fmt: skip
    assert video.sample_indices(10, 16).tolist() == [
        0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9]  # fmt: skip
    assert video.sample_indices(5, 1).tolist() == [0]


@pytest.mark.parametrize(
    "total, native, fps, cap, expected",
    [
        (300, 30, 1, 64, 10),  # ten seconds
        (327, 30, 1, 64, 10),  # 10.9 s: full seconds count
        (30000, 30, 1, 64, 64),  # capped
        (10, 30, 1, 64, 1),  # under a second: still one frame
        (24, 8, 30, 64, 24),  # never more than there are
        (90, 30, 0.5, 64, 1),
        (33, 11, 1, 64, 3),  # 33 / 11 must not round down to 2
    ],
)
def test_fps_sampling_counts(total, native, fps, cap, expected):
    indices = video.sample_indices_fps(total, native, fps, cap)
    assert len(indices) == expected and indices[0] == 0 and indices[-1] < total
    assert len(set(indices)) == expected


def test_a_wrong_request_is_not_the_clips_fault(clip_path):
    for timeout_s in (None, 30):
        with pytest.raises(ValueError, match="sampling = 'every'") as caught:
            sample_frames_within(timeout_s, clip_path, sampling="every")
        assert not isinstance(caught.value, VideoError)


@pytest.mark.parametrize("call", [lambda: video.sample_indices(0, 16),
                                  lambda: video.sample_indices(10, 0),
                                  lambda: video.sample_indices_fps(10, 8, 0, 4),
                                  lambda: video.sample_frames("x.mp4", sampling="every")])
def test_wrong_sampling_arguments_are_named(call, tmp_path):
    with pytest.raises(ValueError, match="must be|no such file"):
        call()


# ---- writing and reading --------------------------------------------------------------------


def test_written_clip_is_the_same_bytes_and_reads_back(tmp_path, clip_path):
    again = tmp_path / "again.mp4"
    write_video(again, numbered_frames(60), fps=8)
    assert again.read_bytes() == clip_path.read_bytes()
    assert os.listdir(tmp_path) == ["again.mp4"]
    frames = video.read_frames(again)
    assert frames.shape == (60, 48, 64, 3) and frames.dtype == np.uint8
    assert numbers(frames) == list(range(60))
    info = video.probe(again)
    assert (info.num_frames, info.fps, info.duration) == (60, 8.0, 7.5)
    assert (info.width, info.height, info.codec) == (64, 48, "h264")


def test_write_refuses_what_h264_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="even height and width, not 47 x 64"):
        write_video(tmp_path / "x.mp4", numbered_frames(2)[:, :47], 8)
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "x.mp4", numbered_frames(2).astype(float), 8)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("height", [64, 48])  # decord fails where the turned width is no 32s
@pytest.mark.parametrize("matrix, quarters", [
    ((1, 0, 0, 1), 0), ((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)])  # fmt: skip
def test_frames_are_turned_as_the_file_says_they_are_shown(tmp_path, matrix, quarters, height):
    """By quarters, clockwise: a phone writes them into the track header of its clips."""
    plain, turned = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    data = bytearray(encode(plain, numbered_frames(12, height)).read_bytes())
    place = data.index(b"tkhd") + 44  # a 3 x 3 matrix of 16.16 numbers (ISO 14496-12, 8.3.2)
    a, b, c, d = (int(x * 65536).to_bytes(4, "big", signed=True) for x in matrix)
    data[place : place + 20] = a + b + bytes(4) + c + d
    turned.write_bytes(data)
    wanted = np.rot90(video.read_frames(plain, [0, 9]), -quarters, axes=(1, 2))
    np.testing.assert_array_equal(video.read_frames(turned, [0, 9]), wanted)
    for frames in decode_both(turned, [0, 9]) if height == 64 else ():
        np.testing.assert_array_equal(frames, wanted)
    info = video.probe(turned)
    assert (info.height, info.width) == wanted.shape[1:3]


def test_read_frames_keeps_the_order_asked_for(clip_path):
    assert numbers(video.read_frames(clip_path, [40, 3, 3, 59])) == [40, 3, 3, 59]
    with pytest.raises(VideoError, match="frame 60 was asked for, it has frames 0 to 59"):
        video.read_frames(clip_path, [0, 60])


@pytest.fixture
def asked(monkeypatch):
    """Which frames each reader is asked for: [(its name, their numbers)]."""
    calls, get_batch, pyav = [], decord.VideoReader.get_batch, video._decode_with_pyav

    def by_decord(self, indices):
        calls.append(("decord", list(indices)))
        return get_batch(self, indices)

    def by_pyav(path, index, numbers):
        calls.append(("PyAV", list(numbers)))
        return pyav(path, index, numbers)

    monkeypatch.setattr(decord.VideoReader, "get_batch", by_decord)
    monkeypatch.setattr(video, "_decode_with_pyav", by_pyav)
    return calls


def test_decord_alone_is_asked_for_the_frames_needed_each_once(clip_path, asked):
    video.read_frames(clip_path, [40, 3, 3, 59])
    video.sample_frames(clip_path, num_frames=4)
    assert asked == [("decord", [3, 40, 59]), ("decord", [0, 19, 39, 59])]


def test_decord_reads_the_clips_of_the_toy_world(tmp_path, asked):
    scene = world.sample_scene(np.random.default_rng(0))
    write_video(tmp_path / "toy.mp4", world.render(scene), world.FPS)
    video.read_frames(tmp_path / "toy.mp4", [0, 9])
    assert asked == [("decord", [0, 9])]


def test_pyav_reads_the_frames_needed_where_decord_raises(clip_path, asked, monkeypatch):
    def fail(self, indices):
        raise decord.DECORDError("it cannot")

    monkeypatch.setattr(decord.VideoReader, "get_batch", fail)
    assert numbers(video.read_frames(clip_path, [40, 3, 3])) == [40, 3, 3]
    assert asked == [("PyAV", [3, 40])]


@pytest.mark.parametrize("timeout_s", [None, 30])
def test_sample_frames_says_where_the_frames_stand(clip_path, timeout_s):
    clip = sample_frames_within(timeout_s, clip_path, num_frames=7)
    assert clip.indices.tolist() == [0, 9, 19, 29, 39, 49, 59]
    assert numbers(clip.frames) == clip.indices.tolist()
    np.testing.assert_allclose(clip.timestamps, clip.indices / 8)
    assert (clip.num_frames_total, clip.fps, clip.duration) == (60, 8.0, 7.5)
    by_rate = video.sample_frames(clip_path, sampling="fps", fps=2, max_frames=9)
    assert len(by_rate.frames) == 9
    assert len(video.sample_frames(clip_path, sampling="fps", fps=2).frames) == 15


@pytest.mark.parametrize("codec, name, options", [
    ("libx264", "bframes.mp4", dict(g=12, bf=3)),
    ("libx265", "hevc.mp4", {"x265-params": "log-level=none"}),
    ("libvpx-vp9", "vp9.webm", dict(g=15)),
    ("libx264", "plain.mkv", dict(g=10)),
])  # fmt: skip
def test_both_readers_give_equal_pixels(tmp_path, codec, name, options):
    path = encode(tmp_path / name, numbered_frames(50), codec, **options)
    indices = [0, 3, 4, 21, 22, 35, 49]
    one, two = decode_both(path, indices)
    assert numbers(one) == indices
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("codec, name, options", [
    ("libx264", "open_gop.mp4", {"g": 10, "bf": 3, "x264-params": "open-gop=1"}),
    ("mpeg4", "b_frames.mp4", dict(g=10, bf=2, qscale=2)),
    ("libx264", "h264.avi", dict(g=10)),
    ("libx264", "stream.ts", dict(g=10)),
    ("libsvtav1", "av1.mkv", dict(preset=10, crf=20)),
])  # fmt: skip
def test_right_frames_where_decord_gives_neighbours_or_nothing(tmp_path, codec, name, options):
    path = encode(tmp_path / name, numbered_frames(50), codec, **options)
    for indices in ([34, 49], [2, 3, 16, 26, 38, 46, 48, 49], [49]):
        assert numbers(video.read_frames(path, indices)) == indices


def test_variable_frame_rate_gives_frames_and_times_as_stored(tmp_path):
    ticks = np.cumsum([0] + [40 if t % 5 else 200 for t in range(1, 50)])
    path = encode(tmp_path / "vfr.mp4", numbered_frames(50), ticks=ticks, g=10)
    clip = video.sample_frames(path, num_frames=9)
    np.testing.assert_allclose(clip.timestamps, ticks[clip.indices] / 1000, atol=2e-3)
    for frames in decode_both(path, clip.indices):
        assert numbers(frames) == clip.indices.tolist()
    assert numbers(np.concatenate(list(video.read_chunks(path, range(50), 8)))) == list(range(50))
    planned, seconds = video.plan_frames(path, num_frames=9)
    assert np.array_equal(planned, clip.indices) and np.array_equal(seconds, clip.timestamps)


@pytest.mark.parametrize("name", ["mp4", "ts"])
@pytest.mark.parametrize("step", [1, 3])
def test_chunks_are_the_frames_in_order_and_no_larger_than_asked(tmp_path, clip_path, name, step):
    path = clip_path
    if name == "ts":  # seeking fails here: PyAV starts again at the first frame it has not given
        path = encode(tmp_path / "x.ts", numbered_frames(60), "mpeg2video", g=12, bf=2)
    indices = range(2, 60, step)
    chunks = list(video.read_chunks(path, indices, size=8))
    assert {len(chunk) for chunk in chunks[:-1]} == {8} and 1 <= len(chunks[-1]) <= 8
    assert np.array_equal(np.concatenate(chunks), video.read_frames(path, indices))


@pytest.mark.parametrize("read", [video.read_chunks, partial(read_chunks_within, 30)])
def test_chunks_of_a_clip_whose_tail_is_broken_come_up_to_the_damage(read, tmp_path, clip_path):
    data, path = bytearray(clip_path.read_bytes()), tmp_path / "tail.mp4"
    at = len(data) * 9 // 10
    data[at : at + 600] = bytes(len(data[at : at + 600]))
    path.write_bytes(data)
    seen = []
    with pytest.raises(VideoError, match=r"tail\.mp4: damaged"):
        for chunk in read(path, range(60), size=4):
            seen += numbers(chunk)
    assert seen == list(range(len(seen))) and 8 <= len(seen) < 60


def test_a_chunk_reader_refuses_frames_out_of_order_or_beyond_the_end(clip_path):
    with pytest.raises(ValueError, match="ascending"):
        list(video.read_chunks(clip_path, [3, 3]))
    with pytest.raises(VideoError, match="frame 60 was asked for, it has frames 0 to 59"):
        list(video.read_chunks(clip_path, [59, 60]))


def test_the_plan_names_the_frames_that_sampling_reads(clip_path):
    numbers, seconds = video.plan_frames(clip_path, sampling="fps", fps=2.0, max_frames=64)
    clip = video.sample_frames(clip_path, sampling="fps", fps=2.0, max_frames=64)
    assert np.array_equal(numbers, clip.indices) and np.array_equal(seconds, clip.timestamps)
    assert len(video.plan_frames(clip_path, num_frames=100)[0]) == 60  # each frame once


def test_pictures_are_clips_of_one_frame(tmp_path):
    Image.fromarray(numbered_frames(1)[0]).save(tmp_path / "picture.png")
    frames = video.read_image(tmp_path / "picture.png")
    clip = video.sample_frames(tmp_path / "picture.png", num_frames=8)  # a clip of one frame
    assert np.array_equal(clip.frames, frames) and clip.indices.tolist() == [0]
    np.testing.assert_array_equal(frames, numbered_frames(1))
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(VideoError, match="text.png: not a readable picture"):
        video.read_image(tmp_path / "text.png")


def test_a_picture_too_large_to_be_honest_is_not_readable(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(VideoError, match="large.png: not a readable picture: .*decompression bomb"):
        video.read_image(tmp_path / "large.png")


# ---- bad files ------------------------------------------------------------------------------


def damage(path, kind, whole: bytes):
    if kind == "missing":
        return "no such file"
    if kind == "empty":
        path.write_bytes(b"")
        return "empty"
    if kind == "text":
        path.write_text("this is not a clip " * 50)
        return "not a readable video"
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
        return "truncated|not a readable|damaged"
    if kind == "head lost":
        path.write_bytes(whole[len(whole) // 3 :])
        return "not a readable video"
    noise = np.random.default_rng(0).integers(0, 256, len(whole) // 3, np.uint8).tobytes()
    path.write_bytes(whole[: len(whole) // 2] + noise + whole[len(whole) // 2 + len(noise) :])
    return "damaged"


KINDS = ["missing", "empty", "text", "truncated", "head lost", "noise"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timeout_s", [None, 30])
def test_bad_file_gives_one_typed_error(tmp_path, clip_path, kind, timeout_s):
    path = tmp_path / "bad.mp4"
    expected = damage(path, kind, clip_path.read_bytes())
    with pytest.raises(VideoError, match=expected) as caught:
        sample_frames_within(timeout_s, path, num_frames=16)
    assert caught.value.path == str(path) and caught.value.reason
    assert str(path) in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("timeout_s", [None, 30])
def test_a_clip_whose_frames_change_size_is_named(tmp_path, timeout_s):
    parts = [encode(tmp_path / f"{height}.ts", numbered_frames(6, height), format="mpegts")
             for height in (48, 64)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(VideoError, match="both.ts: its frames change size, from 64x"):
        sample_frames_within(timeout_s, tmp_path / "both.ts", num_frames=12)


@pytest.mark.parametrize("lost, reason", [
    ({"codec_context": None}, "of an unknown codec"), ({"is_keyframe": False}, "could start at")])
def test_a_stream_that_cannot_be_decoded_is_named(clip_path, monkeypatch, lost, reason):
    """What PyAV gives for a stream of a codec that it does not know, and one without keyframes."""
    packet = SimpleNamespace(size=9, is_discard=False, pts=0, **({"is_keyframe": True} | lost))
    context = SimpleNamespace(name="h264")
    stream = SimpleNamespace(**({"codec_context": context, "frames": 1, "average_rate": 8,
                                 "time_base": Fraction(1, 8)} | lost))  # fmt: skip

    @contextmanager
    def opened(path):
        yield SimpleNamespace(streams=SimpleNamespace(best=lambda kind: stream),
                              demux=lambda stream: [packet],
                              format=SimpleNamespace(name="mp4"))

    monkeypatch.setattr(video, "_open", opened)
    with pytest.raises(VideoError, match=reason):
        video.read_frames(clip_path)


def test_sound_only_file_is_named(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        video.read_frames(path)


def test_hanging_decoder_is_stopped_and_the_next_clip_is_served(clip_path):
    sample_frames_within(30, clip_path, num_frames=2)
    pid = video_child.child()._process.pid
    os.kill(pid, signal.SIGSTOP)  # the child hangs
    with pytest.raises(VideoError, match="took over 0.5 s and was stopped"):
        sample_frames_within(0.5, clip_path, num_frames=2)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert numbers(sample_frames_within(30, clip_path, num_frames=2).frames) == [0, 59]


def test_crashing_decoder_is_an_error_not_a_crash(clip_path):
    sample_frames_within(30, clip_path, num_frames=2)
    os.kill(video_child.child()._process.pid, signal.SIGSEGV)
    with pytest.raises(VideoError, match="crashed the decoder .SIGSEGV"):
        sample_frames_within(30, clip_path, num_frames=2)
    assert numbers(sample_frames_within(30, clip_path, num_frames=2).frames) == [0, 59]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_an_interrupted_clip_has_still_to_say_is_not_the_next_ones(
    error, clip_path, monkeypatch
):
    def interrupt(*_):
        raise error

    calls = [lambda: sample_frames_within(30, clip_path, num_frames=3),
             lambda: next(read_chunks_within(30, clip_path, range(9), 9))]  # fmt: skip
    for call in calls:
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(video_child.Child, "_answer", interrupt)
            call()
        assert numbers(sample_frames_within(30, clip_path, num_frames=2).frames) == [0, 59]


def test_a_clip_that_is_answered_with_an_error_costs_no_new_child(clip_path, tmp_path):
    sample_frames_within(30, clip_path, num_frames=2)
    child = video_child.child()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="not a readable"):
        sample_frames_within(30, tmp_path / "bad.mp4", num_frames=2)
    next(read_chunks_within(30, clip_path, range(60), 20))  # and is closed
    assert numbers(sample_frames_within(30, clip_path, num_frames=2).frames) == [0, 59]
    assert video_child.child() is child


def test_chunks_from_the_child_are_those_read_here(clip_path, tmp_path):
    here = list(video.read_chunks(clip_path, range(3, 60, 2), 8))
    there = list(read_chunks_within(30, clip_path, np.arange(3, 60, 2), 8))
    for one, two in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, two)
    Image.fromarray(here[0][0]).save(tmp_path / "still.png")
    (still,) = read_chunks_within(30, tmp_path / "still.png", [0])
    np.testing.assert_array_equal(still, here[0][:1])
    with pytest.raises(ValueError, match="ascending"):
        next(read_chunks_within(30, clip_path, [3, 3]))


def test_a_clip_may_hang_or_crash_the_decoder_in_its_midst(clip_path):
    for number, message in ((signal.SIGSTOP, "took over 0.5 s"), (signal.SIGSEGV, "SIGSEGV")):
        chunks = read_chunks_within(0.5, clip_path, range(60), 20)
        assert numbers(next(chunks)) == list(range(20))
        os.kill(video_child.child()._process.pid, number)
        with pytest.raises(VideoError, match=message):
            next(chunks)
    assert len(list(read_chunks_within(30, clip_path, range(60), 20))) == 3


def test_a_process_reads_one_long_clip_at_a_time(clip_path):
    first = read_chunks_within(30, clip_path, range(60), 20)
    next(first)
    assert numbers(sample_frames_within(30, clip_path, num_frames=2).frames) == [0, 59]
    second = read_chunks_within(30, clip_path, range(1, 60), 20)
    assert numbers(next(second))[0] == 1
    with pytest.raises(ValueError, match="one long clip at a time"):
        next(first)  # and not the second clip's frames


# ---- real clips -----------------------------------------------------------------------------


@pytest.mark.parametrize("name, num_frames, shape", [
    ("nasa_13013.mp4", 390, (270, 480)), ("flipping_a_pancake.mkv", 310, (240, 426)),
    ("h265_video.mp4", 10, (128, 128)), ("video_0.mov", 3, (320, 568)),
    ("video_90.mov", 3, (568, 320)),
])  # fmt: skip
def test_real_clips_are_equal_through_both_readers(name, num_frames, shape):
    path = real_clip(name)
    info = video.probe(path)
    assert (info.num_frames, info.height, info.width) == (num_frames, *shape)
    indices = video.sample_indices(num_frames, 5)
    one, two = decode_both(path, sorted(set(indices)))
    assert one.shape[1:] == (*shape, 3)
    np.testing.assert_array_equal(one, two)


def test_rotation_flag_turns_the_frames():
    turned = video.read_frames(real_clip("video_90.mov"))
    assert turned.shape[1:] == (568, 320, 3)


def test_real_av1_and_damaged_clips():
    assert video.sample_frames(real_clip("av1_video.mkv"), 4).frames.shape == (4, 360, 640, 3)
    with pytest.raises(VideoError, match="corrupted.mp4: damaged"):
        video.sample_frames(real_clip("corrupted.mp4"), 16)
