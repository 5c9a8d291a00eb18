"""Pictures of what goes in: the steps of the workbook, frames of clips, tokens of a sequence."""

from itertools import groupby

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from tlv.viz.style import (
    BAD,
    FAINT,
    GOOD,
    INK,
    MUTED,
    PALETTE,
    SEQUENTIAL,
    new_figure,
    title_above,
    title_axes,
)

STEPS = ["world", "filtering", "architecture", "pretraining", "SFT", "evaluation", "long video"]


def pipeline_strip(current: str) -> Figure:
    """The steps in a row, the present one lit. `current` is a step or a number like "02"."""
    number = int(current) if current.isdigit() else STEPS.index(current)
    fig, ax = new_figure(9, 0.75)
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


def frame_strip(frames, timestamps, title="", columns=8, marked=(), maps=None) -> Figure:
    """Frames (T, H, W, 3) uint8 side by side, each with its time in s; `marked` ones are framed.

    `timestamps` None: pictures, which have no time. `maps` (T, h, w), where given, are amounts in
    0..1 for each place: the brighter, the more.
    """
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    height, width = frames[0].shape[:2]
    above = 0.05 if timestamps is None else 0.22  # inches, for the time
    total = rows * (1.15 * height / width + above) + 0.3
    fig, axes = new_figure(1.15 * columns, total, rows, columns)
    for ax in np.atleast_1d(axes).flat:
        ax.axis("off")
    for i, (frame, time) in enumerate(zip(frames, _times(frames, timestamps, 2), strict=True)):
        ax = np.atleast_1d(axes).flat[i]
        ax.imshow(frame)
        if maps is not None:
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            ax.imshow(maps[i], cmap=SEQUENTIAL, alpha=0.7 * maps[i], vmin=0, vmax=1, extent=extent)
        ax.set_title(time, fontsize=8, loc="center", color=INK, pad=2)
        if i in marked:
            edge = dict(fill=False, ec=PALETTE["connector"], lw=4, transform=ax.transAxes)
            ax.add_patch(Rectangle((0, 0), 1, 1, **edge))
    title_above(fig, title)
    return fig


def gallery(rows, title="", num_frames=5) -> Figure:
    """Clips below each other: rows of (frames (T, H, W, 3), timestamps (T,), lines, is_good).

    At most `num_frames` frames a row, evenly picked, with their times; beside them `lines` of text.
    Timestamps None: pictures, which have no time. A row that is not good (None: neither) has its
    first line in red. Colours are rounded to 16 steps a channel, which hides the codec's noise and
    keeps the picture small.
    """
    fig, axes = new_figure(9, 0.95 * len(rows) + 0.35, len(rows), num_frames + 1, squeeze=False,
                        width_ratios=[1] * num_frames + [4.8])  # fmt: skip
    for ax in axes.flat:
        ax.axis("off")
    for row, (frames, seconds, texts, is_good) in zip(axes, rows, strict=True):
        picked = np.linspace(0, len(frames) - 1, min(num_frames, len(frames)), dtype=int)
        times = _times(frames, seconds, 1)
        for ax, i in zip(row, picked, strict=False):
            ax.imshow(frames[i] // 16 * 16 + 8)
            ax.set_title(times[i], fontsize=7, loc="center", color=MUTED, pad=1)
        ink = {True: GOOD, False: BAD, None: INK}[is_good]
        for place, line in enumerate(texts):
            row[-1].text(0, 0.97 - 0.21 * place, line, va="top", fontsize=8,
                         color=INK if place else ink, fontweight="normal" if place else "bold",
                         transform=row[-1].transAxes, parse_math=False)  # fmt: skip
    title_above(fig, title)
    return fig


def _times(frames, timestamps, digits: int) -> list[str]:
    """What stands above each frame: its time in s; nothing where there are no times."""
    if timestamps is None:
        return [""] * len(frames)
    return [f"{seconds:.{digits}f} s" for seconds in timestamps]


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
    fig, ax = new_figure(9, 0.33 * len(rows) + 0.75)
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
    title_axes(ax, title)
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
