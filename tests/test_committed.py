"""Committed results are shown as they are, and those that are missing are left out."""

import json

from tlv import committed


def test_two_runs_stand_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    path = tmp_path / committed.PATH
    path.parent.mkdir()
    runs = {"tiny/03_x/metrics.json": {"loss/val": 0.5517, "steps": 1400},
            "tiny/image/03_x/metrics.json": {"steps": 2}}  # fmt: skip
    path.write_text(json.dumps(runs))
    assert committed.side_by_side("03_x", ["loss/val", "steps"]).splitlines() == [
        "             video model   image model",
        "loss/val           0.552             -",
        "steps              1,400             2",
    ]
    del runs["tiny/03_x/metrics.json"]
    path.write_text(json.dumps(runs))
    assert committed.side_by_side("03_x", ["steps"]).splitlines()[0].split() == ["image", "model"]
    assert committed.found("tiny/03_x/metrics.json") == {}
