"""The checks that notebooks print."""

import pytest
import torch

from tlv.checks import check, check_range, check_shape


def test_check_shape():
    x = torch.zeros(2, 3)
    assert check_shape(x, (2, None)) is x
    for shape in ((2, 4), (2,), (2, 3, None)):
        with pytest.raises(ValueError, match=r"frames: shape \(2, 3\), wanted \("):
            check_shape(x, shape, "frames")
    with pytest.raises(ValueError, match=r"wanted \(any, 4\)"):
        check_shape(x, (None, 4))


def test_check_prints_or_stops(capsys):
    check(True, "masks agree")
    assert capsys.readouterr().out == "✓ masks agree\n"
    with pytest.raises(AssertionError, match="✗ masks agree"):
        check(False, "masks agree")


def test_check_range(capsys):
    check_range("accuracy", 0.83, 0.7, 1, "ten questions")
    assert capsys.readouterr().out == "✓ accuracy = 0.83 in [0.7, 1] (ten questions)\n"
    for value in (0.69, float("nan")):
        with pytest.raises(AssertionError, match=r"outside \[0.7, 1\] \(ten questions\)"):
            check_range("accuracy", value, 0.7, 1, "ten questions")
