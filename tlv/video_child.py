"""Sampling a clip in a child process, so that a decoder that hangs or crashes can be survived.

One child per process serves many clips: it costs a start once, then about a millisecond a clip.
"""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from multiprocessing.connection import Connection

import numpy as np

from tlv.video import Clip, VideoError, is_picture, sample_frames


def sample_frames_within(timeout_s: float | None, path, **request) -> Clip:
    """`tlv.video.sample_frames(path, **request)` in a child, which is killed after `timeout_s`.

    Raises VideoError, also for a clip that hangs or crashes the decoder. None: no child.
    """
    if timeout_s is None or is_picture(path):
        return sample_frames(path, **request)
    return child().ask(path, request, timeout_s)


class Child:
    """Sends JSON requests over a pipe; gets a JSON header and the arrays back, never a pickle.

    It ends by itself when the pipe closes, so also when this process dies.
    """

    def __init__(self):
        self._pipe, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-m", "tlv.video_child", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._lock = threading.Lock()
        theirs.close()

    def ask(self, path, request, timeout_s) -> Clip:
        with self._lock:
            try:
                self._pipe.send_bytes(json.dumps({"path": str(path), **request}).encode())
                if not self._pipe.poll(timeout_s):
                    self.stop()
                    raise VideoError(path, f"decoding took over {timeout_s:g} s and was stopped; "
                                           "re-encode the clip or raise timeout_s")
                answer = json.loads(self._pipe.recv_bytes())
                if "mistake" in answer:  # a wrong request is not the clip's fault
                    raise ValueError(answer["mistake"])
                if "reason" in answer:
                    raise VideoError(path, answer["reason"])
                with np.load(io.BytesIO(self._pipe.recv_bytes()), allow_pickle=False) as arrays:
                    return Clip(**arrays, **answer)
            except (EOFError, OSError) as error:
                code = self._process.wait(timeout=5)  # its end of the pipe is closed: it is ending
                self.stop()
                name = signal.Signals(-code).name if code < 0 else f"exit {code}"
                raise VideoError(path, f"it crashed the decoder ({name}); re-encode it") from error

    def stop(self):
        self._process.kill()
        self._process.wait()
        _CHILDREN.pop(os.getpid(), None)


_CHILDREN: dict[int, Child] = {}  # by process: a forked data-loading worker starts its own


def child() -> Child:
    """This process's decoding child, started at the first call."""
    if os.getpid() not in _CHILDREN:
        _CHILDREN[os.getpid()] = Child()
    return _CHILDREN[os.getpid()]


def _serve(pipe: Connection) -> None:
    """Answer requests until the parent closes the pipe (it also closes when the parent dies)."""
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            clip = asdict(sample_frames(**request))
        except ValueError as error:
            is_clip = isinstance(error, VideoError)
            answer = {"reason": error.reason} if is_clip else {"mistake": str(error)}
            pipe.send_bytes(json.dumps(answer).encode())
            continue
        arrays = {name: clip.pop(name) for name in ("frames", "indices", "timestamps")}
        np.savez(buffer := io.BytesIO(), **arrays)
        pipe.send_bytes(json.dumps(clip).encode())
        pipe.send_bytes(buffer.getvalue())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes the pipe
    _serve(Connection(int(sys.argv[1])))
