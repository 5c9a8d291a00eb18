"""Charts of what comes out: curves, bars, histograms, matrices of numbers."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tlv.intervals import clustered_interval
from tlv.viz.style import (
    INK,
    MUTED,
    OTHER,
    PALETTE,
    SEQUENTIAL,
    new_figure,
    title_above,
    title_axes,
)


def loss_curve(train, val=None, title="", part="connector", ylabel="loss (nats per token)"):
    """train, val: (steps, losses). The raw training loss is faint, its running mean is bold."""
    fig, ax = new_figure(6.5, 3.2)
    steps, losses = (np.asarray(v, dtype=float) for v in train)
    colour = PALETTE[part]
    ax.plot(steps, losses, color=colour, alpha=0.25, lw=1)
    window = max(1, len(losses) // 50)
    kernel = np.ones(window) / window
    middle = np.convolve(steps, kernel, "valid")  # a mean stands in the middle of its steps
    ax.plot(middle, np.convolve(losses, kernel, "valid"), color=colour, lw=2,
            label=f"training, mean of {window}" if window > 1 else "training")  # fmt: skip
    if val is not None and len(val[0]):
        ax.plot(*val, "o", color=INK, ms=4, label="validation")
    ax.set(xlabel="optimizer step", ylabel=ylabel, ylim=(0, 1.05 * ax.get_ylim()[1]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    title_axes(ax, title)
    return fig


def bars_with_ci(labels, values, low=None, high=None, baselines=None, title="",
                 xlabel="accuracy", part="llm", unit_range=True) -> Figure:  # fmt: skip
    """Horizontal bars with interval ends `low`, `high`; `baselines` (same length) as ticks.

    `part` gives the colour: one part's for all bars, or a list with the part of each. The label of
    a bar that ends below its baseline names both.
    """
    fig, ax = new_figure(6.5, 0.36 * len(labels) + 1.2)
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
    form = "{:.0%}" if unit_range else "{:,.4g}"
    marks = values if baselines is None else baselines
    for row, (value, end, mark) in enumerate(zip(values, ends, marks, strict=True)):
        text, right = form.format(value), max(end, mark) + 0.015 * span
        if mark > value:
            text += f" (baseline {form.format(mark)})"
        ax.text(right, row, text, va="center", fontsize=9, color=INK)
    ax.set_yticks(y, labels)
    ax.set(xlabel=xlabel, xlim=(0, 1.12 * span))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    title_above(fig, title)
    return fig


def histogram(series: dict, title="", xlabel="", threshold=None, parts=(), bins=40,
              log=False) -> Figure:  # fmt: skip
    """Named sets of values {label: values} over common bins, each as shares of its set.

    `threshold` is drawn as a line; `parts` names the part whose colour each set takes. With `log`
    the shares have a logarithmic axis, so that a bar of a few values is seen.
    """
    fig, ax = new_figure(6.5, 2.8)
    every = np.concatenate([np.asarray(v, dtype=float) for v in series.values()])
    edges = np.linspace(every.min(), every.max() + 1e-9, bins + 1)
    colours = [PALETTE[p] for p in parts] or OTHER
    for (label, values), colour in zip(series.items(), colours, strict=False):
        weights = np.full(len(values), 1 / max(1, len(values)))
        ax.hist(values, edges, weights=weights, color=colour, alpha=0.65, log=log,
                label=f"{label} ({len(values):,})")  # fmt: skip
    if log:
        ax.set_ylim(0.5 / max(map(len, series.values())), 1)  # below a bar of one value
    if threshold is not None:
        ax.axvline(threshold, color=INK, lw=1.2, ls="--", label=f"threshold {threshold:.3g}")
    ax.set(xlabel=xlabel, ylabel="share of its set")
    ax.legend(fontsize=9)
    title_axes(ax, title)
    return fig


def confusion(counts, labels, title="") -> Figure:
    """counts (K, K): rows are truths, columns answers; shaded by the share of each row."""
    counts = np.asarray(counts, dtype=float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 0.48 * len(labels) + 1.9
    fig, ax = new_figure(size + 0.9, size)
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
    fig.colorbar(image, ax=ax, shrink=0.8, label="share of the row")
    title_axes(ax, title)
    return fig


def reliability(confidence, correct, clips, title="", bins=10) -> Figure:
    """Calibration: confidence (n,) in 0..1 against accuracy, 95% intervals clustered by clip (n,);
    below, how many."""
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    clips = np.asarray(clips)
    fig, (ax, low) = new_figure(4.6, 4.6, 2, 1, sharex=True, height_ratios=[4, 1])
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    used = count > 0
    sums = (np.bincount(place, v, minlength=bins) for v in (confidence, correct))
    mean = [s[used] / count[used] for s in sums]
    ends = [clustered_interval(correct[place == b], clips[place == b]) for b in used.nonzero()[0]]
    error = np.maximum((np.array(ends) - mean[1][:, None]) * [-1, 1], 0).T  # (2, bins in use)
    ax.plot([0, 1], [0, 1], "--", color=MUTED, lw=1, label="perfectly calibrated")
    ax.errorbar(*mean, yerr=error, fmt="o-", color=PALETTE["llm"], capsize=3, label="the model")
    ax.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(loc="upper left", frameon=False)
    low.bar(edges[:-1], count, width=1 / bins, align="edge", color=MUTED, ec="white")
    low.set(xlabel="confidence", ylabel="answers")
    title_axes(ax, title)
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
    fig, ax = new_figure(width + 1.4, height + 0.9)
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
    title_above(fig, title)
    return fig


def lines(series: dict, title="", xlabel="", ylabel="", parts=()) -> Figure:
    """Named curves {label: (x, y)} or (x, y, low, high) with interval ends, drawn as a band.

    `parts` names the part whose colour each one takes. Whole numbers x have whole ticks.
    """
    fig, ax = new_figure(6.5, 3.2)
    colours = [PALETTE[p] for p in parts] or [*OTHER, INK, MUTED]
    for (label, (x, y, *ends)), colour in zip(series.items(), colours, strict=False):
        ax.plot(x, y, "o-", ms=4, lw=1.8, color=colour, label=label)
        if ends:
            ax.fill_between(x, *ends, color=colour, alpha=0.15, lw=0)
    if all(float(value).is_integer() for x, *_ in series.values() for value in x):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)
    title_axes(ax, title)
    return fig
