"""Samples that training skips, or uses with a note: counted and listed, never replaced.

Taught in notebooks 03 and 04.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from tlv.files import write_json


@dataclass(frozen=True)
class BadSample:
    """A sample that training skips, or uses with a note, and why."""

    id: str
    reason: str
    is_used: bool = False


class TooManyBadSamples(RuntimeError):
    """More than the allowed share of the samples cannot be used."""


class BadSamples:
    """The distinct bad samples of a run, and the stop when too many are skipped."""

    SMALL = 100  # the share counts from this many samples on, so that one early one does not stop

    def __init__(self, max_share: float, found=(), *, list_path: Path):
        self.max_share, self.list_path = max_share, list_path
        self.found = {(f["split"], f["id"]): BadSample(f["id"], f["reason"], f["is_used"])
                      for f in found}

    def add(self, split: str, bad) -> None:
        """Note BadSamples of a split; the first word on a sample stands."""
        for sample in bad:
            self.found.setdefault((split, sample.id), sample)

    def count(self, is_used: bool) -> int:
        """Samples that were used with a note, or skipped."""
        return sum(sample.is_used == is_used for sample in self.found.values())

    def as_list(self) -> list[dict]:
        """What report.json lists."""
        return [{"split": split, **asdict(sample)}
                for (split, _), sample in sorted(self.found.items())]

    def check(self, split: str, num_seen: int, num_samples: int, manifest) -> None:
        """Raise TooManyBadSamples when the share of skipped ones exceeds the limit; then all that
        were found are listed in `list_path`, for a run that stops here has no report."""
        bad = [sample for (where, _), sample in self.found.items()
               if where == split and not sample.is_used]
        seen = max(min(num_seen, num_samples), min(num_samples, self.SMALL))
        if len(bad) > self.max_share * seen:
            write_json(self.list_path, self.as_list())
            examples = "\n".join(f"  {sample.id}: {sample.reason}" for sample in bad[:5])
            raise TooManyBadSamples(
                f"{manifest}: {len(bad)} bad {split} samples among {seen}: more than "
                f"max_bad_share = {self.max_share:g}. Filter the manifest (notebook 01) or raise "
                f"the limit. The first ones:\n{examples}\nAll of them: {self.list_path}")
