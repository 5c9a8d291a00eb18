"""What a long clip costs, part by part: seconds and memory against the number of frames.

Memory is what a process needs beyond imports and the model, at its peak, less the video
tokens and the LLM's cache: these grow with the clip whatever the code does, all else should not.
Linux alone can tell (/proc). Taught in notebook 06.
"""

import ctypes
import gc
import time
from pathlib import Path

import torch

from tlv.background import Background
from tlv.builders import load_model
from tlv.keyframes import choose_keyframes
from tlv.kv_cache import make_cache
from tlv.long_video import encode_clip, prefill
from tlv.selector import CHUNK, FRAME_S
from tlv.video_child import read_chunks_within

LIBC = ctypes.CDLL(None)
# glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX: freed blocks go back to the system.
GIVE_BACK = ((-3, 2**16), (-1, 2**17), (-8, 1))
PARTS = ("decode", "embed", "select", "encode", "merge", "prefill")


def measure(model_dir, paths, query: str, device: str = "cpu", num_threads: int = 1) -> list[dict]:
    """For each clip seconds of each of PARTS, `num_frames`, and MiB: `peak_mib`, `tokens_mib`,
    `cache_mib`.

    In a process of its own. Every frame is read. A first, short run warms up what is made once. On
    a GPU the peak is that of its memory beyond the model.
    """
    values = dict(model_dir=model_dir, paths=paths, query=query, device=device)
    return Background({"clips": (_measure, values)}, num_threads).wait()["clips"]


@torch.inference_mode()
def _measure(model_dir, paths, query, device) -> list[dict]:
    # What is measured is what is needed, not the holes that a growing heap happens to keep.
    for option, value in GIVE_BACK:
        LIBC.mallopt(option, value)
    model, processor = load_model(model_dir)
    model.to(device)
    processor.to(device)
    processor.selector.cache_dir = None  # the first pass is measured, not read back
    gc.freeze()  # modules stay; to go through them again at every part takes longer than the parts
    processor.fps, processor.max_frames = 1e6, CHUNK
    _run(model, processor, paths[-1], query)
    processor.max_frames = 10**6
    return [_run(model, processor, path, query) for path in paths]


def _run(model, processor, path, query) -> dict[str, float]:
    numbers, _ = processor.plan(path)
    seconds, start = dict.fromkeys(PARTS, 0.0), _settle(model.device)
    peak = 0.0

    def timed(part, function):
        def call(*args):
            begin = _now(model.device)
            result = function(*args)
            seconds[part] += _now(model.device) - begin
            return result

        return call

    def note(held_mib=0.0):
        """Of the part that ends here: its peak, less what the clip's tokens and cache hold."""
        nonlocal peak
        peak = max(peak, _peak_mib(model.device) - start - held_mib)
        _settle(model.device)

    def decode_all():
        for _ in read_chunks_within(FRAME_S, path, numbers, CHUNK):
            pass

    timed("decode", decode_all)()
    frames = timed("embed", processor.selector.embed_clip)(path, numbers)  # (T, D_q)
    note()
    vector = processor.selector.embed_text(query)
    keyframes = timed("select", choose_keyframes)(
        processor.selection, frames, vector, processor.num_keyframes, processor.keyframe_threshold
    )
    note()
    plain = model.vision_features
    model.vision_features = timed("encode", plain)
    look = [(keyframes, vector)]
    (tokens,) = timed("merge", encode_clip)(model, processor, path, look)  # (S, D)
    model.vision_features = plain
    tokens_mib = tokens.nbytes / 2**20
    note(tokens_mib)
    cache = make_cache(model.language_model.config, len(tokens))
    timed("prefill", prefill)(model, tokens[None], cache)
    kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    cache_mib = sum(t.nbytes for t in kept) / 2**20
    note(tokens_mib + cache_mib)
    seconds["embed"] -= seconds["decode"]  # both passes decode as well
    seconds["merge"] -= seconds["decode"] + seconds["encode"]
    sizes = {"tokens_mib": tokens_mib, "cache_mib": cache_mib, "peak_mib": peak}
    return {"num_frames": len(numbers), **seconds, **sizes}


def _now(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()  # what was asked of the GPU is done, not only asked
    return time.perf_counter()


def _settle(device) -> float:
    """Give freed memory back and forget the peak -> MiB in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        LIBC.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now
    return _peak_mib(device)


def _peak_mib(device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
