"""What a clip costs is measured in a process of its own, and every part of it is there."""

import pytest

from tlv import scaling
from tlv.mp4 import write_video


def test_every_part_is_measured_and_memory_is_what_it_says(build_tiny, pair_dir, tmp_path,
                                                           clip_frames):
    parts = build_tiny(connector_type="vilamp", selector_dir=pair_dir, sampling="fps", fps=1.0,
                       max_frames=8, num_keyframes=3, merging_width=8)  # fmt: skip
    for part in parts:
        part.save_pretrained(tmp_path / "model")
    write_video(tmp_path / "clip.mp4", clip_frames(150), fps=8)
    write_video(tmp_path / "short.mp4", clip_frames(20), fps=8)
    paths = [tmp_path / "short.mp4", tmp_path / "clip.mp4"]
    short, found = scaling.measure(tmp_path / "model", paths, "a park")
    assert short["num_frames"] == 20 and short["cache_mib"] < found["cache_mib"]
    assert found["num_frames"] == 150  # all of them, whatever the model samples
    assert all(found[part] > 0 for part in ("decode", "embed", "select", "encode", "prefill"))
    num_tokens = 3 * 4 + 147
    assert found["tokens_mib"] == pytest.approx(num_tokens * 32 * 4 / 2**20)
    assert found["cache_mib"] == pytest.approx(2 * 2 * num_tokens * 16 * 4 / 2**20)
    assert found["peak_mib"] > 0
