"""What the committed runs of the toy world found: shown in notebooks, never computed with.

`make report` gathers it in notebooks/measured.json, so that no notebook reads the outputs of a real
run. Cells that use it are tagged `measured`: no stage's result depends on another run's.
Taught in notebooks 00 to 06.
"""

import json

from tlv import ROOT

MODELS = {"video model": "tiny", "image model": "tiny/image"}  # TinyLLaVA-Video's form, TinyLLaVA's

WAYS = {"dks": "DKS", "top_k": "top-K", "uniform": "uniform"}
FORMS = {
    "dfm": "K keyframes, others merged (DFM)",
    "mean": "K keyframes, others averaged",
    "whole": "as many tokens, in more keyframes",
    "drop": "K keyframes alone, fewer tokens",
}


SHOWN = (  # below outputs/
    *(f"{preset}/{stage}/metrics.json" for preset in MODELS.values()
      for stage in ("02_architecture", "03_pretraining", "04_sft")),
    "tiny/00_toy_world/metrics.json",
    "tiny/01_data_filtering/metrics.json",
    "tiny/01_data_filtering/examples.json",
    "tiny/05_evaluation/metrics.json",
    "tiny/06_long_video/scaling.json",
    "tiny/long/06_long_video/metrics.json",
)  # fmt: skip
PATH = "notebooks/measured.json"


def found(name: str) -> dict:
    """One of the files SHOWN, as the committed run wrote it; {} where there was no run."""
    return json.loads((ROOT / PATH).read_text()).get(name, {})


def side_by_side(stage: str, keys) -> str:
    """The metrics `keys` of both models as a table; a run that is not there has no column."""
    runs = {name: found(f"{preset}/{stage}/metrics.json") for name, preset in MODELS.items()}
    runs = {name: values for name, values in runs.items() if values}
    width = max(map(len, keys)) + 2
    rows = [" " * width + "".join(f"{name:>14}" for name in runs)]
    for key in keys:
        cells = [_cell(values.get(key)) for values in runs.values()]
        rows.append(f"{key:{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(rows)


def two_columns(stage: str, columns: dict, rows) -> str:
    """Shares from one file of the video model, with the 95% intervals where it has some:
    `columns` are titles and what the keys of each begin with, `rows` how they end."""
    values, width = found(f"tiny/{stage}/metrics.json"), max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{title:>22}" for title in columns)]
    for row in rows:
        cells = [_share(values, begin + row) for begin in columns.values()]
        lines.append(f"{row:{width}}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def grid_table(metrics: dict) -> str:
    """Answers on long clips for each selection and form of merging: the metrics of `make long`."""
    if not metrics:
        return "No run of `make long` yet."
    rows = [f"| tokens | {' | '.join(WAYS.values())} |", "|---|---|---|---|"]
    for form, title in FORMS.items():
        keys = [f"accuracy/{way}" if (way, form) == ("uniform", "dfm") else f"accuracy/{way}_{form}"
                for way in WAYS]  # fmt: skip
        cells = [f"{metrics[k]:.1%} ({metrics[f'{k}/low']:.1%} to {metrics[f'{k}/high']:.1%})"
                 if k in metrics else "" for k in keys]  # fmt: skip
        rows.append(f"| {title} | {' | '.join(cells)} |")
    lengths = [int(k.split("/")[-1]) for k in metrics if k.startswith("accuracy/uniform/frames/")]
    rows.append(f"\n{metrics['num_questions']} questions on clips of {min(lengths)} to "
                f"{max(lengths):,} frames; chance {metrics['accuracy/chance']:.1%}.")
    return "\n".join(rows)


def _cell(value) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _share(values: dict, key: str) -> str:
    if key not in values:
        return "-"
    ends = [f"{100 * values[key + end]:.0f}" for end in ("/low", "/high") if key + end in values]
    return f"{values[key]:.1%}" + (f" ({' to '.join(ends)})" if ends else "")
