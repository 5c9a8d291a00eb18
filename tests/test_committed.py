"""Committed results are shown as they are, and those that are missing are left out."""

import json

from tlv import committed


def test_two_runs_stand_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    runs = {"tiny": {"loss/val": 0.5517, "steps": 1400}, "tiny/image": {"steps": 2}}
    for preset, values in runs.items():
        folder = tmp_path / "outputs" / preset / "03_x"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(values))
    assert committed.side_by_side("03_x", ["loss/val", "steps"]).splitlines() == [
        "             video model   image model",
        "loss/val           0.552             -",
        "steps              1,400             2",
    ]
    (tmp_path / "outputs/tiny/03_x/metrics.json").unlink()
    assert committed.side_by_side("03_x", ["steps"]).splitlines()[0].split() == ["image", "model"]
    assert committed.metrics("tiny", "03_x") == {}
