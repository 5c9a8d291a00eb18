"""The house style of figures: one colour per part of the model, one sequential map."""

import io

import matplotlib
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

from tlv.files import write_bytes

# The Okabe-Ito colours: told apart by colour-blind readers and in grey print.
PALETTE = {"vision": "#0072B2", "connector": "#D55E00", "llm": "#009E73", "text": "#CC79A7"}
OTHER = ("#56B4E9", "#E69F00")  # two more of them, for sets and curves that belong to no part
INK, MUTED, FAINT, GOOD, BAD = "#222222", "#8A8A8A", "#E6E6E6", "#009E73", "#C0392B"
SEQUENTIAL = "cividis"  # the one map for amounts
TITLE = dict(fontsize=11, fontweight="bold", color=INK)

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


def new_figure(width: float, height: float, rows=1, columns=1, **options):
    """A figure in the house style that pyplot does not keep (a cell shows it once) and its axes."""
    with matplotlib.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=(width, height), **options)
    plt.close(fig)
    return fig, axes


def save(fig: Figure, path) -> Figure:
    """Write a PNG without dates or versions in it, whole or not at all; returns `fig`."""
    with matplotlib.rc_context(STYLE):
        fig.savefig(picture := io.BytesIO(), format="png", metadata={"Software": None})
    write_bytes(path, picture.getvalue())
    return fig


def title_axes(ax, title: str) -> None:
    """A title that begins where the axes begin."""
    if title:
        ax.set_title(title, loc="left", **TITLE)


def title_above(fig: Figure, title: str) -> None:
    """A title that begins where the picture begins: for long labels on the left, or many axes."""
    if title:
        fig.suptitle(title, x=0.01, ha="left", **TITLE)
