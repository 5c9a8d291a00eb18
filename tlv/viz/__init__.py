"""Every figure of the workbook: one colour per part of the model, one sequential map.

Each function draws one kind of figure and returns it; `save(fig, path)` writes the same PNG bytes
every time and returns the figure. In a notebook, end a cell with either call: the figure shows.
"""

from tlv.viz.charts import (
    bars_with_ci,
    confusion,
    heatmap,
    histogram,
    lines,
    loss_curve,
    reliability,
)
from tlv.viz.strips import frame_strip, gallery, pipeline_strip, token_mask
from tlv.viz.style import PALETTE, save

__all__ = [
    "PALETTE",
    "bars_with_ci",
    "confusion",
    "frame_strip",
    "gallery",
    "heatmap",
    "histogram",
    "lines",
    "loss_curve",
    "pipeline_strip",
    "reliability",
    "save",
    "token_mask",
]
