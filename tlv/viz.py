"""Every figure's style: one colour per part of the model, one sequential map, plain functions.

Each function draws one kind of figure and returns it; `save(fig, path)` writes the same PNG bytes
every time and returns the figure. In a notebook, end a cell with either call: the figure shows.
"""

import os
from itertools import groupby
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

# The Okabe-Ito colours: told apart by colour-blind readers and in grey print.
PALETTE = {"vision": "#0072B2", "connector": "#D55E00", "llm": "#009E73", "text": "#CC79A7"}
INK, MUTED, FAINT, GOOD, BAD = "#222222", "#8A8A8A", "#E6E6E6", "#009E73", "#C0392B"
SEQUENTIAL = "cividis"  # the one map for amounts
STEPS = ["world", "filtering", "architecture", "pretraining", "SFT", "evaluation", "long video"]

STYLE = {
    "figure.dpi": 80,
    "savefig.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    "svg.hashsalt": "tlv",
}
STYLE = sns.axes_style("ticks") | STYLE


def _figure(width: float, height: float, rows=1, columns=1, **options):
    """A figure in the house style that pyplot does not keep (a cell shows it once) and its axes."""
    with matplotlib.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=(width, height), **options)
    plt.close(fig)
    return fig, axes


def save(fig: Figure, path) -> Figure:
    """Write a PNG without dates or versions in it, whole or not at all; returns `fig`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with matplotlib.rc_context(STYLE):
        fig.savefig(draft, format="png", metadata={"Software": None})
    os.replace(draft, path)
    return fig


def _title(ax, title: str) -> None:
    if title:
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)


# ---- where we are ---------------------------------------------------------------------------


def pipeline_strip(current: str) -> Figure:
    """The steps in a row, the present one lit. `current` is a step or a number like "02"."""
    number = int(current) if current.isdigit() else STEPS.index(current)
    fig, ax = _figure(9, 0.75)
    for i, name in enumerate(STEPS):
        face, ink = (PALETTE["vision"], "white") if i == number else (FAINT, INK)
        box = dict(boxstyle="round,pad=0.04", fc=face, ec="none")
        ax.add_patch(FancyBboxPatch((i * 1.5, 0), 1.2, 0.5, **box))
        weight = "bold" if i == number else "normal"
        ax.text(i * 1.5 + 0.6, 0.25, f"{i:02d} {name}", ha="center", va="center", color=ink,
                fontsize=9, fontweight=weight)  # fmt: skip
        if i:
            arrow = dict(arrowstyle="-|>", color=MUTED, lw=1)
            ax.annotate("", (i * 1.5 - 0.05, 0.25), (i * 1.5 - 0.25, 0.25), arrowprops=arrow)
    ax.set(xlim=(-0.1, len(STEPS) * 1.5 - 0.2), ylim=(-0.1, 0.6))
    ax.axis("off")
    return fig


# ---- clips ----------------------------------------------------------------------------------


def frame_strip(frames, timestamps, title="", columns=8, marked=(), maps=None) -> Figure:
    """Frames (T, H, W, 3) uint8 side by side, each with its time in s; `marked` ones are framed.

    `maps` (T, h, w), where given, are amounts in 0..1 for each place: the brighter, the more.
    """
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    height, width = frames[0].shape[:2]
    fig, axes = _figure(1.15 * columns, rows * (1.15 * height / width + 0.22) + 0.3, rows, columns)
    for ax in np.atleast_1d(axes).flat:
        ax.axis("off")
    for i, (frame, seconds) in enumerate(zip(frames, timestamps, strict=True)):
        ax = np.atleast_1d(axes).flat[i]
        ax.imshow(frame)
        if maps is not None:
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            ax.imshow(maps[i], cmap=SEQUENTIAL, alpha=0.6, vmin=0, extent=extent)
        ax.set_title(f"{seconds:.2f} s", fontsize=8, loc="center", color=INK, pad=2)
        if i in marked:
            edge = dict(fill=False, ec=PALETTE["connector"], lw=4, transform=ax.transAxes)
            ax.add_patch(Rectangle((0, 0), 1, 1, **edge))
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return fig


def gallery(rows, title="", num_frames=5) -> Figure:
    """Clips below each other: rows of (frames (T, H, W, 3), timestamps (T,), lines, is_good).

    At most `num_frames` frames a row, evenly picked, with their times; beside them `lines` of text.
    A row that is not good (None: neither) has its first line in red. Colours are rounded to 16
    steps a channel, which hides the codec's noise and keeps the picture small.
    """
    fig, axes = _figure(9, 0.95 * len(rows) + 0.35, len(rows), num_frames + 1, squeeze=False,
                        width_ratios=[1] * num_frames + [4.8])  # fmt: skip
    for ax in axes.flat:
        ax.axis("off")
    for row, (frames, seconds, texts, is_good) in zip(axes, rows, strict=True):
        picked = np.linspace(0, len(frames) - 1, min(num_frames, len(frames)), dtype=int)
        for ax, i in zip(row, picked, strict=False):
            ax.imshow(frames[i] // 16 * 16 + 8)
            ax.set_title(f"{seconds[i]:.1f} s", fontsize=7, loc="center", color=MUTED, pad=1)
        ink = {True: GOOD, False: BAD, None: INK}[is_good]
        for place, line in enumerate(texts):
            row[-1].text(0, 0.97 - 0.21 * place, line, va="top", fontsize=8,
                         color=INK if place else ink, fontweight="normal" if place else "bold",
                         transform=row[-1].transAxes, parse_math=False)  # fmt: skip
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return fig


def token_mask(tokens, supervised, title="", columns=72) -> Figure:
    """A token sequence as coloured tiles: what the loss sees (`supervised`) and what it does not.

    tokens: list of str (L,); supervised: list of bool (L,). `columns` is the line's width in
    characters. Runs of the placeholder `<video>` show as one tile with their number.
    """
    tiles = _tiles(tokens, supervised)
    rows, x = [[]], 0.0
    for text, kind in tiles:
        width = max(len(text), 1) + 0.8
        if x + width > columns:
            rows.append([])
            x = 0.0
        rows[-1].append((x, width, text, kind))
        x += width + 0.2
    fig, ax = _figure(9, 0.33 * len(rows) + 0.75)
    face = {"video": PALETTE["vision"], "answer": PALETTE["text"], "context": FAINT}
    for y, row in enumerate(rows):
        for x, width, text, kind in row:
            ax.add_patch(Rectangle((x, -y - 0.4), width, 0.8, fc=face[kind], ec="white", lw=0.5))
            ax.text(x + width / 2, -y, text, ha="center", va="center_baseline", fontsize=8,
                    family="monospace", color=INK if kind == "context" else "white")  # fmt: skip
    labels = {"video": "video tokens", "answer": "supervised", "context": "context, no loss"}
    handles = [Rectangle((0, 0), 1, 1, fc=face[k], label=v) for k, v in labels.items()]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), ncols=3, fontsize=8,
              borderpad=0, borderaxespad=0.4, frameon=False)  # fmt: skip
    ax.set(xlim=(0, columns), ylim=(-len(rows) + 0.4, 0.6))
    ax.axis("off")
    _title(ax, title)
    return fig


def _tiles(tokens, supervised) -> list[tuple[str, str]]:
    """Merge runs of `<video>`; show a space as an open box and a line break as an arrow."""
    tiles, pairs = [], zip(tokens, supervised, strict=True)
    for is_video, run in groupby(pairs, key=lambda pair: pair[0] == "<video>"):
        if is_video:
            tiles.append((f"<video> x {len(list(run))}", "video"))
        else:
            tiles += [(token.replace("\n", "↵").replace(" ", "␣"),
                       "answer" if is_learnt else "context") for token, is_learnt in run]
    return tiles


# ---- curves and bars ------------------------------------------------------------------------


def loss_curve(train, val=None, title="", part="connector", ylabel="loss (nats per token)"):
    """train, val: (steps, losses). The raw training loss is faint, its running mean is bold."""
    fig, ax = _figure(6.5, 3.2)
    steps, losses = (np.asarray(v, dtype=float) for v in train)
    colour = PALETTE[part]
    ax.plot(steps, losses, color=colour, alpha=0.25, lw=1)
    window = max(1, len(losses) // 25)
    kernel = np.ones(window) / window
    ax.plot(steps[window - 1 :], np.convolve(losses, kernel, "valid"), color=colour, lw=2,
            label=f"training, mean of {window}" if window > 1 else "training")  # fmt: skip
    if val is not None and len(val[0]):
        ax.plot(*val, "o-", color=INK, ms=4, lw=1.2, label="validation")
    ax.set(xlabel="optimizer step", ylabel=ylabel, ylim=(0, None))
    ax.legend(frameon=False)
    _title(ax, title)
    return fig


def bars_with_ci(labels, values, low=None, high=None, baselines=None, title="",
                 xlabel="accuracy", part="llm", unit_range=True) -> Figure:  # fmt: skip
    """Horizontal bars with interval ends `low`, `high`; `baselines` (same length) as ticks.

    `part` gives the colour: one part's for all bars, or a list with the part of each.
    """
    fig, ax = _figure(6.5, 0.36 * len(labels) + 1.2)
    y, values = np.arange(len(labels)), np.asarray(values, dtype=float)
    colours = [PALETTE[p] for p in ([part] if isinstance(part, str) else part)]
    ax.barh(y, values, color=colours, height=0.62, alpha=0.85)
    ends = values if high is None else np.asarray(high, dtype=float)
    if low is not None and high is not None:
        error = [values - np.asarray(low, dtype=float), ends - values]
        ax.errorbar(values, y, xerr=np.maximum(error, 0), fmt="none", ecolor=INK, capsize=3, lw=1.2)
    if baselines is not None:
        ax.plot(baselines, y, "|", color=PALETTE["connector"], ms=17, mew=3, label="best baseline")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1, fontsize=9,
                  frameon=False)  # fmt: skip
    span = 1.0 if unit_range else float(np.max(ends))
    # beside the interval, and beside the baseline's mark where that lies farther out
    right = ends if baselines is None else np.maximum(ends, np.asarray(baselines) + 0.01 * span)
    for row, (value, end) in enumerate(zip(values, right, strict=True)):
        text = f"{value:.0%}" if unit_range else f"{value:,.4g}"
        ax.text(end + 0.015 * span, row, text, va="center", fontsize=9, color=INK)
    ax.set_yticks(y, labels)
    ax.set(xlabel=xlabel, xlim=(0, 1.12 * span))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return fig


def histogram(series: dict, title="", xlabel="", threshold=None, parts=(), bins=40) -> Figure:
    """Named sets of values {label: values} over common bins, each as shares of its set.

    `threshold` is drawn as a line; `parts` names the part whose colour each set takes.
    """
    fig, ax = _figure(6.5, 2.8)
    every = np.concatenate([np.asarray(v, dtype=float) for v in series.values()])
    edges = np.linspace(every.min(), every.max() + 1e-9, bins + 1)
    colours = [PALETTE[p] for p in parts] or list(PALETTE.values())
    for (label, values), colour in zip(series.items(), colours, strict=False):
        weights = np.full(len(values), 1 / max(1, len(values)))
        ax.hist(values, edges, weights=weights, color=colour, alpha=0.65,
                label=f"{label} ({len(values):,})")  # fmt: skip
    if threshold is not None:
        ax.axvline(threshold, color=INK, lw=1.2, ls="--", label=f"threshold {threshold:.3g}")
    ax.set(xlabel=xlabel, ylabel="share")
    ax.legend(fontsize=9)
    _title(ax, title)
    return fig


def confusion(counts, labels, title="") -> Figure:
    """counts (K, K): rows are truths, columns answers; shaded by the share of each row."""
    counts = np.asarray(counts, dtype=float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 0.48 * len(labels) + 1.9
    fig, ax = _figure(size + 0.9, size)
    image = ax.imshow(share, cmap=SEQUENTIAL, vmin=0, vmax=1)
    for i, j in np.ndindex(*counts.shape):
        if counts[i, j]:
            ink = INK if share[i, j] > 0.55 else "white"
            ax.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", color=ink, fontsize=8)
    ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(labels)), labels)
    ax.set(xlabel="answer", ylabel="truth")
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    fig.colorbar(image, ax=ax, shrink=0.8, label="share of the truth")
    _title(ax, title)
    return fig


def reliability(confidence, correct, title="", bins=10) -> Figure:
    """Calibration: confidence (n,) in 0..1 against accuracy, 95% intervals; below, how many."""
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    fig, (ax, low) = _figure(4.6, 4.6, 2, 1, sharex=True, height_ratios=[4, 1])
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    used = count > 0
    sums = (np.bincount(place, v, minlength=bins) for v in (confidence, correct))
    mean = [s[used] / count[used] for s in sums]
    # Wilson's interval: it stays inside 0..1 and is right for small bins.
    n, p, z = count[used], mean[1], 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    error = np.maximum([p - (centre - half), centre + half - p], 0)
    ax.plot([0, 1], [0, 1], "--", color=MUTED, lw=1, label="perfectly calibrated")
    ax.errorbar(*mean, yerr=error, fmt="o-", color=PALETTE["llm"], capsize=3, label="the model")
    ax.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(loc="upper left", frameon=False)
    low.bar(edges[:-1], count, width=1 / bins, align="edge", color=MUTED, ec="white")
    low.set(xlabel="confidence", ylabel="answers")
    _title(ax, title)
    return fig


def heatmap(values, title="", xlabel="", ylabel="", label="", xticks=None, yticks=None,
            texts=None, limits=(None, None)) -> Figure:
    """A matrix (rows, columns) of amounts, such as attention weights, in the one sequential map.

    `texts`, where given, is what stands in each cell; `limits` are the ends of the map.
    """
    values = np.asarray(values, dtype=float)
    rows, columns = values.shape
    width = float(np.clip(0.3 * columns, 3.5, 8))
    height = float(np.clip(width * rows / columns, 1.6, 6)) if texts is None else 0.45 * rows
    fig, ax = _figure(width + 1.4, height + 0.9)
    image = ax.imshow(values, cmap=SEQUENTIAL, aspect="auto", vmin=limits[0], vmax=limits[1])
    for row, column in np.ndindex(values.shape if texts is not None else (0, 0)):
        ink = "white" if image.norm(values[row, column]) < 0.5 else INK
        ax.text(column, row, texts[row][column], ha="center", va="center", color=ink, fontsize=8)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(False)
    if xticks is not None:
        ax.set_xticks(range(columns), xticks, rotation=45, ha="right", rotation_mode="anchor")
    if yticks is not None:
        ax.set_yticks(range(rows), yticks)
    fig.colorbar(image, ax=ax, label=label)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return fig


def lines(series: dict, title="", xlabel="", ylabel="", parts=()) -> Figure:
    """Named curves {label: (x, y)}; `parts` names the part whose colour each one takes."""
    fig, ax = _figure(6.5, 3.2)
    colours = [PALETTE[p] for p in parts] or [*PALETTE.values(), INK, MUTED]
    for (label, (x, y)), colour in zip(series.items(), colours, strict=False):
        ax.plot(x, y, "o-", ms=4, lw=1.8, color=colour, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)
    _title(ax, title)
    return fig
