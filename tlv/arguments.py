"""Values on a command line, for argparse: a wrong one ends the command in one line."""

import argparse

from tlv.devices import find_device


def to_device(name: str) -> str:
    """A device that can be computed on; an argparse error for another."""
    try:
        return find_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None


def to_count(text: str) -> int:
    """A count, from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)
