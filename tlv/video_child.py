"""Decoding clips in a child process, so that a decoder that hangs or crashes can be survived.

One child per thread serves many clips: it costs a start once, then about a millisecond a clip.
"""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from multiprocessing.connection import Connection

import numpy as np

from tlv.video import Clip, VideoError, is_picture, read_chunks, sample_frames


def sample_frames_within(timeout_s: float | None, path, **request) -> Clip:
    """`tlv.video.sample_frames(path, **request)` in a child, which is killed after `timeout_s`.

    Raises VideoError, also for a clip that hangs or crashes the decoder. None: no child.
    """
    if timeout_s is None or is_picture(path):
        return sample_frames(path, **request)
    return child().sample(path, request, timeout_s)


def read_chunks_within(timeout_s: float | None, path, indices, size: int = 64):
    """`tlv.video.read_chunks(path, indices, size)` in a child, killed after `timeout_s` on a frame.

    Raises VideoError, also for a clip that hangs or crashes the decoder anywhere. None: no child.
    One clip at a time.
    """
    if timeout_s is None or is_picture(path):
        return read_chunks(path, indices, size)
    return child().chunks(path, [int(number) for number in indices], size, timeout_s)


class Child:
    """Sends JSON requests over a pipe; gets JSON and the arrays' bytes back, never a pickle.

    It ends by itself when the pipe closes, so also when this process dies.
    """

    def __init__(self):
        self._pipe, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-m", "tlv.video_child", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._lock, self._serials = threading.Lock(), count()
        theirs.close()

    def sample(self, path, request, timeout_s) -> Clip:
        with self._talk(path, {"sample": {"path": str(path), **request}}):
            answer = self._answer(path, timeout_s)
            with np.load(io.BytesIO(self._pipe.recv_bytes()), allow_pickle=False) as arrays:
                return Clip(**arrays, **answer)

    def chunks(self, path, indices: list[int], size: int, timeout_s):
        """Frame by frame, so that beside the chunk no more than a frame is in memory twice."""
        request = {"serial": next(self._serials), "clip": {"path": str(path), "indices": indices}}
        for start in range(0, len(indices), size):
            request["count"] = min(size, len(indices) - start)
            with self._talk(path, request):
                shape = self._answer(path, timeout_s)["shape"]  # (H, W, 3)
                chunk = np.empty((request["count"], *shape), np.uint8)  # (n, H, W, 3)
                self._pipe.recv_bytes_into(chunk[0].reshape(-1))
                for frame in chunk[1:]:
                    self._answer(path, timeout_s)
                    self._pipe.recv_bytes_into(frame.reshape(-1))
            yield chunk
            request.pop("clip", None)

    @contextmanager
    def _talk(self, path, request):
        """Send a request; a child that ends before it has answered was crashed by the clip."""
        with self._lock:
            try:
                self._pipe.send_bytes(json.dumps(request).encode())
                yield
            except (EOFError, OSError) as error:
                code = self._process.wait(timeout=5)  # its end of the pipe is closed: it is ending
                self.stop()
                name = signal.Signals(-code).name if code < 0 else f"exit {code}"
                raise VideoError(path, f"it crashed the decoder ({name}); re-encode it") from error
            except ValueError:  # answered to its end: a VideoError, or a mistake
                raise
            except BaseException:  # interrupted: what is still to come is not the next clip's
                self.stop()
                raise

    def _answer(self, path, timeout_s) -> dict:
        if not self._pipe.poll(timeout_s):
            self.stop()
            raise VideoError(path, f"decoding took over {timeout_s:g} s and was stopped; "
                                   "re-encode the clip or raise timeout_s")
        answer = json.loads(self._pipe.recv_bytes())
        if "mistake" in answer:  # a wrong request is not the clip's fault
            raise ValueError(answer["mistake"])
        if "reason" in answer:
            raise VideoError(path, answer["reason"])
        return answer

    def stop(self):
        self._process.kill()
        self._process.wait()
        for key in [key for key, child in _CHILDREN.items() if child is self]:
            del _CHILDREN[key]


# By process and thread: a forked data-loading worker starts its own, threads decode side by side.
_CHILDREN: dict[tuple[int, int], Child] = {}


def child() -> Child:
    """This thread's decoding child, started at the first call."""
    key = os.getpid(), threading.get_ident()
    if key not in _CHILDREN:
        _CHILDREN[key] = Child()
    return _CHILDREN[key]


def _serve(pipe: Connection) -> None:
    """Answer requests until the parent closes the pipe (it also closes when the parent dies)."""
    reader = Reader()
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if "sample" in request:
                _send_clip(pipe, sample_frames(**request["sample"]))
            else:
                for frame in reader.read(**request):
                    pipe.send_bytes(json.dumps({"shape": frame.shape}).encode())
                    pipe.send_bytes(frame.tobytes())
        except ValueError as error:
            is_clip = isinstance(error, VideoError)
            answer = {"reason": error.reason} if is_clip else {"mistake": str(error)}
            pipe.send_bytes(json.dumps(answer).encode())


def _send_clip(pipe: Connection, clip: Clip) -> None:
    clip = asdict(clip)
    arrays = {name: clip.pop(name) for name in ("frames", "indices", "timestamps")}
    np.savez(buffer := io.BytesIO(), **arrays)
    pipe.send_bytes(json.dumps(clip).encode())
    pipe.send_bytes(buffer.getvalue())


class Reader:
    """The frames of the one long clip that is being read, as they are asked for."""

    def __init__(self):
        self._serial, self._frames = None, None

    def read(self, serial: int, count: int, clip: dict | None = None):
        """The next `count` frames (H, W, 3) of reading `serial`, which starts with `clip`."""
        if clip is not None:
            self._serial, self._frames = serial, read_chunks(**clip, size=1)
        if serial != self._serial:
            raise ValueError("a thread reads one long clip at a time, each to its end")
        for _ in range(count):
            yield next(self._frames)[0]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes the pipe
    _serve(Connection(int(sys.argv[1])))
