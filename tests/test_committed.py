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


def test_shares_stand_in_columns_with_their_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    path = tmp_path / committed.PATH
    path.parent.mkdir()
    values = {"a/red": 0.5, "a/red/low": 0.412, "a/red/high": 0.588}
    values |= {"b/green": 1.0}
    path.write_text(json.dumps({"tiny/05_x/metrics.json": values}))
    table = committed.two_columns("05_x", {"one": "a/", "two": "b/"}, ["red", "green"])
    assert table.splitlines() == [
        "                          one                   two",
        "red          50.0% (41 to 59)                     -",
        "green                       -                100.0%",
    ]
