"""What the committed runs of the toy world found: shown in notebooks, never computed with.

Cells that use it are tagged `measured`, so that no stage's result depends on another run's.
Taught in notebooks 02 to 04 and 06.
"""

import json

from tlv import ROOT

MODELS = {"video model": "tiny", "image model": "tiny/image"}  # TinyLLaVA-Video's form, TinyLLaVA's

WAYS = {"dks": "DKS", "top_k": "top-K", "uniform": "uniform"}
FORMS = {
    "dfm": "K keyframes, others merged (DFM)",
    "mean": "K keyframes, others averaged",
    "whole": "as many, in more whole frames",
    "drop": "K keyframes alone, fewer tokens",
}


def metrics(preset: str, stage: str) -> dict:
    """metrics.json of a stage's run; {} where there is none."""
    path = ROOT / "outputs" / preset / stage / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else {}


def side_by_side(stage: str, keys) -> str:
    """The metrics `keys` of both models as a table; a run that is not there has no column."""
    found = {name: metrics(preset, stage) for name, preset in MODELS.items()}
    found = {name: values for name, values in found.items() if values}
    width = max(map(len, keys)) + 2
    rows = [" " * width + "".join(f"{name:>14}" for name in found)]
    for key in keys:
        cells = [_cell(values.get(key)) for values in found.values()]
        rows.append(f"{key:{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(rows)


def grid_table(preset: str) -> str:
    """Answers on long clips for each selection and form of merging, from `make long`."""
    found = metrics(f"{preset}/long", "06_long_video")
    if not found:
        return f"No run of `make long` with the preset `{preset}` yet."
    rows = [f"| tokens | {' | '.join(WAYS.values())} |", "|---|---|---|---|"]
    for form, title in FORMS.items():
        keys = [f"accuracy/{way}" if (way, form) == ("uniform", "dfm") else f"accuracy/{way}_{form}"
                for way in WAYS]  # fmt: skip
        cells = [f"{found[k]:.1%} ({found[f'{k}/low']:.1%} to {found[f'{k}/high']:.1%})"
                 if k in found else "" for k in keys]  # fmt: skip
        rows.append(f"| {title} | {' | '.join(cells)} |")
    lengths = [int(k.split("/")[-1]) for k in found if k.startswith("accuracy/uniform/frames/")]
    rows.append(f"\n{found['num_questions']} questions on clips of {min(lengths)} to "
                f"{max(lengths):,} frames; chance {found['accuracy/chance']:.1%}.")
    return "\n".join(rows)


def _cell(value) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
