"""The README's tables say what outputs/ says."""

import io
import json
import re
import subprocess
import tarfile
from contextlib import redirect_stdout

import pytest

from tlv import ROOT, committed, costs, notebooks, questions, report
from tlv.funnel import CATCHES


def test_tables_come_from_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(costs, "ROOT", tmp_path)
    costs.record_cost("tiny", "03_pretraining", 120, 2048 * 1024)
    costs.record_cost("tiny", "04_sft", 30, 1024 * 1024)
    costs.record_cost("tiny/image", "04_sft", 45, 1024 * 1024)
    folders = [tmp_path / f"outputs/tiny/{side}05_evaluation" for side in ("", "image/")]
    metrics = {"accuracy/free": 0.8125, "accuracy/choice": 0.9, "accuracy/unseen_pairs": 0.5,
               "accuracy/type/order": 0.75, "baseline/type/order": 0.25, "num_questions": 900,
               "accuracy/type/order/free": 0.7, "baseline/type/order/free": 0.1,
               "accuracy/type/order/choice": 0.8, "baseline/type/order/choice": 0.4,
               "seed": 0, "other/type/order": 0.5}  # fmt: skip
    scores = [key for key in metrics if key.startswith(("accuracy/", "other/"))]
    metrics |= {f"{key}/low": metrics[key] - 0.05 for key in scores}
    metrics |= {f"{key}/high": metrics[key] + 0.05 for key in scores}
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics))
    keys = [f"hit_rate/{way}" for way in ("dks", "top_k", "uniform")]
    keys += ["accuracy/dks_dfm", "accuracy/uniform"]
    long = {f"{key}{end}": value for key in keys
            for end, value in (("", 0.5), ("/low", 0.4), ("/high", 0.6))}
    long |= {"accuracy/chance": 0.25, "num_trials": 80, "num_questions": 120}
    (tmp_path / "outputs/tiny/06_long_video").mkdir()
    (tmp_path / "outputs/tiny/06_long_video/metrics.json").write_text(json.dumps(long))
    ways, forms = ("dks", "top_k", "uniform"), ("dfm", "mean", "whole", "drop")
    for way, form in ((way, form) for way in ways for form in forms):
        name = "uniform" if (way, form) == ("uniform", "dfm") else f"{way}_{form}"
        score = 0.3 if (way, form) == ("top_k", "mean") else 0.2
        if (way, form) == ("top_k", "drop"):
            continue  # a run may leave some out
        for end, value in (("", score), ("/low", score - 0.1), ("/high", score + 0.1)):
            long[f"accuracy/{name}{end}"] = value
    long |= {"accuracy/uniform/frames/500": 0.1, "accuracy/uniform/frames/10000": 0.1}
    folder = tmp_path / "outputs/tiny/long/06_long_video"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(long))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "README.md").write_text(
        "a\n<!-- results -->\nold\n<!-- /results -->\nb\n<!-- costs -->\n<!-- /costs -->\n"
        "<!-- long -->\n<!-- /long -->\n<!-- grid -->\n<!-- /grid -->\n"
    )
    assert report.main(["readme"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| free-form | 81.2% | 76.2% to 86.2% |" in text
    order = "70.0% (65% to 75%) | 10.0% | 80.0% (75% to 85%) | 40.0% | 50.0% (45% to 55%)"
    assert f"| order | {order} |" in text
    assert "| image model on pictures: free-form | 81.2% | 76.2% to 86.2% |" in text
    assert "| 03_pretraining | 2.0 min | 2.0 GiB |" in text
    assert "| **the video model** | **2.5 min** | **2.0 GiB** |" in text and "old" not in text
    assert "| image_04_sft | 45 s | 1.0 GiB |" in text
    assert "| DKS | 50.0% | 40.0% to 60.0% | 50.0% | 40.0% to 60.0% |" in text
    assert "| top-K | 50.0% | 40.0% to 60.0% |  |  |" in text and "| chance | | | 25.0% | |" in text
    assert ("| K keyframes, others averaged | 20.0% (10.0% to 30.0%) | 30.0% (20.0% to 40.0%) | "
            "20.0% (10.0% to 30.0%) |") in text  # fmt: skip
    assert "alone, fewer tokens | 20.0% (10.0% to 30.0%) |  | 20.0% (10.0% to 30.0%) |" in text
    assert "120 questions on clips of 500 to 10,000 frames; chance 25.0%." in text
    assert text.startswith("a\n") and "\nb\n" in text
    shown = json.loads((tmp_path / committed.PATH).read_text())
    runs = ["05_evaluation", "long/06_long_video"]  # of those that are shown
    assert list(shown) == [f"tiny/{run}/metrics.json" for run in runs]
    assert shown["tiny/05_evaluation/metrics.json"] == metrics
    assert shown["tiny/long/06_long_video/metrics.json"] == long


def test_each_machine_has_a_column_of_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "ROOT", tmp_path)
    for name, seconds in (("slow", 100), ("fast", 20), ("fast", 10)):
        monkeypatch.setattr(costs, "machine", lambda name=name: name)
        costs.record_cost("tiny", "00_x", seconds, 1024 * seconds * 10)
    costs.record_cost("tiny", "01_y", 15, 1024)
    table = report.cost_table("tiny").splitlines()
    assert table[0] == "| stage | slow | fast | peak memory |"
    assert table[2:4] == ["| 00_x | 1.7 min | 10 s | 1.0 GiB |", "| 01_y |  | 15 s | 0.0 GiB |"]
    assert table[4] == "| **the video model** |  | **25 s** | **1.0 GiB** |"
    today = costs.read_costs("tiny")["01_y"]["fast"]["date"]
    assert table[5:] == ["| **all of it** |  | **25 s** | **1.0 GiB** |",
                         f"| date | {today} | {today} | |"]  # fmt: skip
    assert "| tiny | fast | 10 s | 0.1 GiB |" in costs.banner_table("00_x")  # the newest


def test_the_readme_has_the_marks_and_the_two_commands():
    text = (ROOT / "README.md").read_text()
    for name in ("results", "costs", "long", "grid"):
        report.fill(text, name, "x")
    assert "\nmake repro " in text and "\nmake test " in text
    with pytest.raises(ValueError, match="<!-- other -->"):
        report.fill(text, "other", "x")


# ---- what is committed ----------------------------------------------------------------------


@pytest.fixture
def head(tmp_path, monkeypatch):
    """README and results of the last commit: a reader's own run may differ, and may."""
    archive = subprocess.run(
        ["git", "archive", "HEAD", "README.md", "outputs", "notebooks"], cwd=ROOT, check=True,
        capture_output=True,
    ).stdout  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(tmp_path, filter="data")
    for module in (report, costs, committed):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_the_readme_shows_what_outputs_say(head):
    text = (head / "README.md").read_text()
    assert report.filled(text, "tiny") == text, "run `make report` and commit README.md"
    shown = json.loads((head / committed.PATH).read_text())
    assert shown == report.measured(), f"run `make report` and commit {committed.PATH}"


def test_the_readmes_sentences_say_what_outputs_say(head):
    """Numbers in its prose that no table is filled with."""
    text = " ".join((head / "README.md").read_text().split())
    found = report.metrics_of("tiny", "05_evaluation")
    margins = {key: found[key.replace("baseline", "accuracy")] - value
               for key, value in found.items() if key.startswith("baseline/type/")}
    of_type = min((100 * m, key) for key, m in margins.items() if key.count("/") == 2)
    of_form = min((100 * m, key) for key, m in margins.items() if key.count("/") == 3)
    assert (f"the least margin of a type is that of {of_type[1].split('/')[2]}, {of_type[0]:.0f} "
            f"points (of a type in one form, that of {of_form[1].split('/')[2]} in ") in text
    assert f", {of_form[0]:.0f})" in text
    world = report.metrics_of("tiny", "00_toy_world")
    assert f"is right in {world['single_frame/order']:.0%} (chance: 50%)" in text
    assert f"at an unknown moment in {world['single_frame/order_any_time']:.0%}" in text


def test_every_committed_cost_has_a_machine_and_a_date(head):
    for preset in ("smoke", "tiny", "tiny/image", "tiny/long"):
        for stage, found in costs.read_costs(preset).items():
            assert found and all({"wall_s", "peak_mib", "date"} == set(cost)
                                 for cost in found.values()), (preset, stage)  # fmt: skip
            peaks = [cost["peak_mib"] for cost in found.values()]
            assert max(peaks) <= 4096, (preset, stage, "the goal is 4 GiB")


@pytest.mark.parametrize("name", notebooks.names())
def test_the_notebooks_show_what_outputs_say(head, name):
    cells = notebooks.read(head / f"notebooks/{name}.ipynb").cells
    assert costs.banner_table(name) in cells[0].source, "run `make notebooks`"
    given = {"committed": committed, "questions": questions, "TYPES": questions.TYPES,
             "CATCHES": CATCHES, "Markdown": str}  # fmt: skip
    prints = re.compile(r"^(print|Markdown)\(committed", flags=re.M)
    (table,) = [cell for cell in cells if cell.cell_type == "code" and prints.search(cell.source)]
    (output,) = table.outputs
    if prints.search(table.source)[1] == "Markdown":
        before, name, call = table.source.partition("Markdown")
        exec(before, given)
        shown, there = eval(name + call, given), output.data["text/markdown"]
    else:
        with redirect_stdout(io.StringIO()) as printed:
            exec(table.source, given)
        shown, there = printed.getvalue(), output.text
    assert shown == there, "run `make report`, `make notebooks`"


def test_the_committed_world_and_model_reach_their_goals(head):
    world = report.metrics_of("tiny", "00_toy_world")
    asked = {key: n for key, n in world.items() if key.startswith("num_test_questions/")}
    assert world["num_test_clips"] >= 300 and len(asked) == 8
    assert min(asked.values()) >= 2 * 150  # each question counts twice: once in each form
    assert world["single_frame/direction"] <= 0.35  # of four; chance is 0.25
    assert world["single_frame/order_any_time"] <= 0.6  # of two; chance is 0.5
    filters = report.metrics_of("tiny", "01_data_filtering")
    assert min(filters[f"{what}/overall"] for what in ("precision", "recall")) >= 0.9
    found = report.metrics_of("tiny", "05_evaluation")
    assert found["accuracy/free"] >= 0.8 and found["accuracy/choice"] >= 0.85
    margins = {key: found[key.replace("baseline", "accuracy")] - value
               for key, value in found.items() if key.startswith("baseline/type/")}
    assert len(margins) == 8 * 3  # of a type together, freely, as multiple choice
    whole = [margin for key, margin in margins.items() if key.count("/") == 2]
    assert len(whole) == 8 and min(whole) >= 0.25, margins
    assert min(margins.values()) >= 0.2, margins  # in one form alone: half as many questions
    long = report.metrics_of("tiny", "06_long_video")
    assert long["accuracy/dks_dfm"] - long["accuracy/chance"] >= 0.3
    assert long["accuracy/dks_dfm"] - long["accuracy/uniform"] >= 0.15
    assert long["hit_rate/dks"] >= 0.95 and long["num_questions"] >= 100
