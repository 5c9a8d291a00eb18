"""What a run notes of samples that it skips or cuts, and when it stops."""

import json

import pytest

from tlv.bad_samples import BadSample, BadSamples, TooManyBadSamples


def test_too_many_bad_samples_stop_with_examples_and_a_list(tmp_path):
    bad = BadSamples(0.05, list_path=tmp_path / "bad.json")
    bad.add("train", [BadSample("a", "empty file")] * 2)  # seen in two epochs: one sample
    bad.check("train", 10, 1000, "qa.json")
    bad.add("train", [BadSample(f"b{i}", "empty file") for i in range(5)])
    with pytest.raises(TooManyBadSamples) as error:
        bad.check("train", 10, 1000, "qa.json")
    assert "6 bad train samples among 100" in str(error.value)
    assert "a: empty" in str(error.value) and "b4: empty" not in str(error.value)
    assert str(error.value).endswith(f"All of them: {tmp_path / 'bad.json'}")
    assert [b["id"] for b in json.loads((tmp_path / "bad.json").read_text())] == [
        "a", "b0", "b1", "b2", "b3", "b4"]  # fmt: skip
    bad.check("train", 120, 1000, "qa.json")  # as many of more seen are within the share
    bad.check("val", 1, 1, "qa.json")
    with pytest.raises(TooManyBadSamples):
        bad.check("train", 10_000, 100, "qa.json")  # never more than there are


def test_samples_that_are_cut_are_counted_apart_and_do_not_stop(tmp_path):
    bad = BadSamples(0.0, list_path=tmp_path / "bad.json")
    bad.add("train", [BadSample(f"a{i}", "9 tokens are cut", is_used=True) for i in range(5)])
    bad.check("train", 10, 1000, "qa.json")
    assert (bad.count(is_used=True), bad.count(is_used=False)) == (5, 0)
    bad.add("train", [BadSample("b", "empty file")])
    with pytest.raises(TooManyBadSamples, match="qa.json: 1 bad train samples"):
        bad.check("train", 10, 1000, "qa.json")


def test_the_list_of_bad_samples_survives_a_restart(tmp_path):
    bad = BadSamples(1.0, list_path=tmp_path / "bad.json")
    bad.add("train", [BadSample("b", "x"), BadSample("a", "y", is_used=True)])
    stored = json.loads(json.dumps(bad.as_list()))
    again = BadSamples(1.0, stored, list_path=tmp_path / "bad.json")
    assert again.as_list() == bad.as_list() == [
        {"split": "train", "id": "a", "reason": "y", "is_used": True},
        {"split": "train", "id": "b", "reason": "x", "is_used": False}]
