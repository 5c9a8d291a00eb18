"""A few small clips with conversations of unequal length, for the tests of data and training."""

import json

import numpy as np

from tlv.mp4 import write_video

WORDS = "a red circle moves to the left and a blue square stays in the middle of it".split()


def turn(role, text):
    return {"from": role, "value": text}


def make_sample(index: int, video: str) -> dict:
    """Two turns; the answers have 1 to 14 words, no two samples alike."""
    answers = [" ".join(WORDS[: 1 + (5 * index + 3 * k) % 14]) for k in range(2)]
    return {"id": f"s{index}", "video": video, "conversations": [
        turn("human", "<video>\nWhat happens?"), turn("gpt", answers[0] + "."),
        turn("human", "And then?"), turn("gpt", answers[1] + "."),
    ]}  # fmt: skip


def make_world(folder, num_samples=10, bad=()):
    """Write clips and data.json into `folder`; `bad` samples lose their clip's bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    samples = []
    for index in range(num_samples):
        path = folder / f"{index}.mp4"
        write_video(path, rng.integers(0, 256, (6, 20, 24, 3), dtype=np.uint8), fps=8)
        if index in bad:
            path.write_bytes(b"no clip")
        samples.append(make_sample(index, path.name))
    (folder / "data.json").write_text(json.dumps(samples))
    return folder
