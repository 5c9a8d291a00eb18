"""The README's tables, from what runs left in outputs/.

`python -m tlv.report costs` prints the cost table; `python -m tlv.report readme` puts it and the
results between the README's `<!-- name -->` and `<!-- /name -->` lines, and what notebooks show of
these runs into notebooks/measured.json.
"""

import argparse
import json
import re
import sys

from tlv import ROOT
from tlv.committed import PATH, SHOWN, WAYS, grid_table
from tlv.config import load_params
from tlv.costs import duration, read_costs
from tlv.evaluate import FORMS
from tlv.files import write_json, write_text

BASELINE = "baseline/type/"
PARTS = (
    ("free-form", "accuracy/free"),
    ("multiple choice", "accuracy/choice"),
    ("shape-colour pairs never seen in training", "accuracy/unseen_pairs"),
)


def metrics_of(preset: str, stage: str) -> dict:
    """metrics.json of a stage's run; {} where there is none."""
    return _read(f"{preset}/{stage}/metrics.json")


def _read(name: str) -> dict:
    path = ROOT / "outputs" / name
    return json.loads(path.read_text()) if path.exists() else {}


def measured() -> dict:
    """What `tlv.committed` shows, from the runs that are there."""
    return {name: values for name in SHOWN if (values := _read(name))}


def cost_table(preset: str) -> str:
    """One row per stage: its wall time on each machine and the memory of its largest process; then
    the sums."""
    every = read_costs(preset)
    video = {name: found for name, found in every.items() if name < "06"}
    long = {name: found for name, found in every.items() if name >= "06"}
    image = {f"image_{name}": found for name, found in read_costs(f"{preset}/image").items()}
    if not video:
        return f"No recorded run of the preset `{preset}` yet."
    machines = list(dict.fromkeys(where for found in every.values() for where in found))
    rows = [f"| stage | {' | '.join(machines)} | peak memory |", "|---" * (len(machines) + 2) + "|"]
    groups = (video, "the video model"), (image, "the image model"), (long, "long video")
    for costs, title in groups:
        rows += [_cost_row(name, [found], machines) for name, found in costs.items()]
        if costs:
            rows.append(_cost_row(title, list(costs.values()), machines, "**"))
    rows.append(_cost_row("all of it", [*video.values(), *image.values(), *long.values()],
                          machines, "**"))  # fmt: skip
    dates = [max(found[where]["date"] for found in every.values() if where in found)
             for where in machines]  # fmt: skip
    return "\n".join([*rows, f"| date | {' | '.join(dates)} | |"])


def _cost_row(title: str, stages: list[dict], machines: list[str], mark: str = "") -> str:
    """Sum of the stages' times on each machine that ran all of them, and the most memory."""
    times = [duration(sum(found[where]["wall_s"] for found in stages))
             if all(where in found for found in stages) else "" for where in machines]  # fmt: skip
    peak = max(cost["peak_mib"] for found in stages for cost in found.values()) / 1024
    cells = [title, *times, f"{peak:.1f} GiB"]
    return f"| {' | '.join(f'{mark}{cell}{mark}' if cell else '' for cell in cells)} |"


def result_table(preset: str) -> str:
    """Held-out accuracy, then by question type and form beside the best baseline, from 05."""
    metrics, pictures = (metrics_of(f"{preset}{side}", "05_evaluation") for side in ("", "/image"))
    if not metrics:
        return f"No evaluated run of the preset `{preset}` yet."
    rows = ["| questions | accuracy | 95% interval |", "|---|---|---|"]
    rows += [f"| {label} | {_with_interval(metrics, key)} |" for label, key in PARTS
             if key in metrics]  # own questions may lack a form
    for label, key in PARTS:
        if key not in pictures:
            continue
        rows.append(f"| image model on pictures: {label} | {_with_interval(pictures, key)} |")
    rows += ["", "| type | free-form | best baseline | multiple choice | best baseline | "
             "image model, both forms |", "|---|---|---|---|---|---|"]  # fmt: skip
    kinds = {key.split("/")[2] for key in metrics if key.startswith(BASELINE)}
    for kind in sorted(kinds):
        cells = [kind]
        for form in FORMS:
            asked = f"{BASELINE}{kind}/{form}" in metrics
            cells += [_interval_behind(metrics, f"accuracy/type/{kind}/{form}"),
                      f"{metrics[f'{BASELINE}{kind}/{form}']:.1%}"] if asked else ["", ""]
        other = f"other/type/{kind}"
        cells.append(_interval_behind(metrics, other) if other in metrics else "")
        rows.append(f"| {' | '.join(cells)} |")
    rows.append(f"\n{metrics['num_questions']} questions about clips, seed {metrics['seed']}.")
    return "\n".join(rows)


def long_table(preset: str) -> str:
    """Needles hit and questions answered on long clips, from 06's metrics.json, by selection."""
    metrics = metrics_of(preset, "06_long_video")
    if not metrics:
        return f"No run of notebook 06 with the preset `{preset}` yet."
    rows = ["| keyframes | needles hit beside a distractor | 95% interval | questions answered | "
            "95% interval |", "|---|---|---|---|---|"]  # fmt: skip
    for (way, title), key in zip(
        WAYS.items(), ("accuracy/dks_dfm", None, "accuracy/uniform"), strict=True
    ):
        answered = _with_interval(metrics, key) if key else " | "
        rows.append(f"| {title} | {_with_interval(metrics, f'hit_rate/{way}')} | {answered} |")
    rows.append(f"| chance | | | {metrics['accuracy/chance']:.1%} | |")
    rows.append(f"\n{metrics['num_trials']} haystacks; {metrics['num_questions']} questions, equal "
                "numbers of keyframes and tokens.")  # fmt: skip
    return "\n".join(rows)


def _with_interval(metrics: dict, key: str) -> str:
    low, high = metrics[f"{key}/low"], metrics[f"{key}/high"]
    return f"{metrics[key]:.1%} | {low:.1%} to {high:.1%}"


def _interval_behind(metrics: dict, key: str) -> str:
    return f"{metrics[key]:.1%} ({metrics[f'{key}/low']:.0%} to {metrics[f'{key}/high']:.0%})"


def fill(text: str, name: str, table: str) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"README.md: the marks <!-- {name} --> ... <!-- /{name} --> are not there")
    return text


def filled(text: str, preset: str) -> str:
    """The README with all its tables as outputs/<preset>/ has them."""
    tables = {"costs": cost_table, "results": result_table, "long": long_table,
              "grid": lambda preset: grid_table(metrics_of(f"{preset}/long", "06_long_video"))}
    for name, table in tables.items():
        text = fill(text, name, table(preset))
    return text


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tlv.report", description=__doc__)
    parser.add_argument("action", choices=["costs", "readme"])
    parser.add_argument("--preset", help="default: tiny; of costs, the one that `dvc repro` runs")
    options = parser.parse_args(arguments)
    if options.action == "costs":
        runs = load_params(ROOT / "params/preset.yaml")["preset"]
        print(cost_table(options.preset or runs))
        return 0
    path = ROOT / "README.md"
    write_text(path, filled(path.read_text(), options.preset or "tiny"))
    write_json(ROOT / PATH, measured())
    print(f"README.md: tables filled; {PATH}: gathered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
