"""Figures: the same bytes every time, of modest size, true to their numbers."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from tlv import viz
from tlv.viz import strips

TOKENS = ["USER", ":", *["<video>"] * 64, "\n", " Colour", "?", " red", ".", "<|endoftext|>"]
SUPERVISED = [t in (" red", ".", "<|endoftext|>") for t in TOKENS]
FRAMES = np.full((16, 48, 48, 3), 220, np.uint8)
for t in range(16):
    FRAMES[t, 10:30, 2 * t : 2 * t + 16] = 200, 30, 30  # a red square that moves right
FIGURES = {
    "pipeline_strip": lambda: viz.pipeline_strip("02"),
    "frame_strip": lambda: viz.frame_strip(FRAMES, np.arange(16) / 8, "A clip", marked=[2]),
    "frame_maps": lambda: viz.frame_strip(FRAMES, np.arange(16) / 8, "Weights",
                                          maps=np.random.default_rng(0).random((16, 6, 6))),
    "cells": lambda: viz.heatmap([[0.1, 0.9]], "Hits", texts=[["1/9", "9/9"]], limits=(0, 1)),
    "pictures": lambda: viz.frame_strip(FRAMES[:2], None, "Two pictures"),
    "one_frame": lambda: viz.frame_strip(FRAMES[:1], [0.5]),
    "gallery": lambda: viz.gallery(
        [(FRAMES, np.arange(16) / 8, ["Q: where?", "A: right"], True),
         (FRAMES[:2], [0, 1], ["short"], None), (FRAMES[:2], None, [], False)], "Two clips"),
    "histogram": lambda: viz.histogram({"a": [1, 2, 2], "b": [5.0]}, "Apart", "size", 3.0),
    "log_histogram": lambda: viz.histogram({"a": [1] * 99 + [9]}, "One is far", "size", log=True),
    "token_mask": lambda: viz.token_mask(TOKENS, SUPERVISED, "The answers count"),
    "loss_curve": lambda: viz.loss_curve(([1, 2, 3], [3, 2, 1]), ([1, 3], [3, 1]), "It falls"),
    "bars_with_ci": lambda: viz.bars_with_ci(["a", "b"], [0.9, 1], [0.8, 0.9], [1, 1], [0.2, 0.5]),
    "bars": lambda: viz.bars_with_ci(["x"], [1.2e6], unit_range=False, xlabel="parameters"),
    "confusion": lambda: viz.confusion([[5, 1], [0, 7]], ["left", "right"], "Mostly right"),
    "reliability": lambda: viz.reliability([0.1, 0.9, 1], [0, 1, 1], [0, 1, 1], "Calibrated"),
    "heatmap": lambda: viz.heatmap(np.eye(4), "Each looks at itself", "key", "query", "weight"),
    "lines": lambda: viz.lines({"group": ([1, 2], [3, 4])}, "Up", "frames", "cost", ["connector"]),
    "band": lambda: viz.lines({"a": ([0, 0.5], [3, 4], [2, 3], [4, 5])}, "Up", "share", "cost"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_deterministic_small_and_not_kept(name, tmp_path):
    first, second = tmp_path / "a" / "1.png", tmp_path / "a" / "2.png"
    fig = viz.save(FIGURES[name](), first)
    viz.save(FIGURES[name](), second)
    assert fig.axes and plt.get_fignums() == []  # a notebook cell shows it once
    assert first.read_bytes() == second.read_bytes()
    assert len(list(first.parent.iterdir())) == 2  # no drafts left
    assert first.stat().st_size < 60_000
    assert Image.open(first).width < 1200


def test_strip_lights_the_present_step_by_name_or_number():
    bold = [
        [t.get_text() for t in viz.pipeline_strip(step).axes[0].texts if t.get_weight() == "bold"]
        for step in ("02", "architecture")
    ]
    assert bold == [["02 architecture"]] * 2
    with pytest.raises(ValueError):
        viz.pipeline_strip("no such step")


def test_frame_strip_shows_every_time():
    fig = viz.frame_strip(FRAMES[:3], [0, 0.125, 1.5])
    assert [ax.get_title() for ax in fig.axes] == ["0.00 s", "0.12 s", "1.50 s"]
    with pytest.raises(ValueError):
        viz.frame_strip(FRAMES[:3], [0, 1])


def test_pictures_have_no_time():
    rows = [(FRAMES[:2], None, ["left and right"], None)]
    for fig in (viz.frame_strip(FRAMES[:2], None), viz.gallery(rows, num_frames=2)):
        assert {ax.get_title() for ax in fig.axes} == {""}


def test_token_tiles_merge_the_video_and_colour_the_answers():
    tiles = strips._tiles(TOKENS, SUPERVISED)
    assert ("<video> x 64", "video") in tiles and len(tiles) == len(TOKENS) - 63
    assert [text for text, kind in tiles if kind == "answer"] == ["␣red", ".", "<|endoftext|>"]


def test_intervals_end_where_they_are_said_to():
    fig = viz.bars_with_ci(["a"], [0.5], [0.4], [0.7])
    (segment,) = fig.axes[0].collections[0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [0.4, 0.7])


def test_a_label_beside_a_baseline_names_both():
    given = dict(low=[0, 0.8], high=[0.3, 1])
    fig = viz.bars_with_ci(["a", "b"], [0.1, 0.9], **given, baselines=[1, 0.5])
    assert [t.get_text() for t in fig.axes[0].texts] == ["10% (baseline 100%)", "90%"]
    places = [t.get_position()[0] for t in fig.axes[0].texts]
    assert min(places) > 1  # beyond the interval, and beyond the baseline's mark


def test_a_band_ends_where_it_is_said_to():
    fig = viz.lines({"a": ([0, 1], [0.5, 0.6], [0.4, 0.5], [0.7, 0.8])})
    (band,) = fig.axes[0].collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.4, 0.8)


def test_steps_are_whole_and_the_first_point_is_not_cut():
    losses = [0, 1, 2], [6.6, 6.5, 6.2]
    for fig in (viz.loss_curve(losses), viz.lines({"a": losses})):
        assert all(float(tick).is_integer() for tick in fig.axes[0].get_xticks())
    low, high = viz.loss_curve(losses).axes[0].get_ylim()
    assert low == 0 and high > 6.6 * 1.04
    ticks = viz.lines({"a": ([0, 0.5, 1], [1, 2, 3])}).axes[0].get_xticks()
    assert not all(float(tick).is_integer() for tick in ticks)  # shares


def test_a_running_mean_stands_in_the_middle_of_its_steps():
    fig = viz.loss_curve((range(100), [1.0] * 50 + [0.0] * 50))
    steps, means = fig.axes[0].lines[1].get_data()
    assert steps[means == 0.5].tolist() == [49.5]


def test_calibration_intervals_widen_where_a_clip_has_several_answers():
    confidence, correct = [0.9] * 40, [1, 1, 1, 0] * 10
    alone, together = (viz.reliability(confidence, correct, clips).axes[0].collections[0]
                       for clips in (range(40), [i // 4 % 2 for i in range(40)]))
    height = [np.ptp(bars.get_segments()[0][:, 1]) for bars in (alone, together)]
    assert height[0] < height[1]
