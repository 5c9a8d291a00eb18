"""What the committed runs of the toy world found: shown in notebooks, never computed with.

Cells that use it are tagged `measured`, so that no stage's result depends on another run's.
Taught in notebooks 02 to 04.
"""

import json

from tlv import ROOT

MODELS = {"video model": "tiny", "image model": "tiny/image"}  # TinyLLaVA-Video's form, TinyLLaVA's


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


def _cell(value) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
