"""A pool of samples through a row of filters, and the score of that row where the truth is known.

The filters themselves, which see no truth, are in `tlv.filters`. Taught in notebook 01.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from tlv.filters import Verdict

# Which planted kinds each filter is there for (`tlv.defects`).
CATCHES = {
    "readable": ("unreadable", "truncated", "empty"),
    "duration": (),
    "motion": ("static",),
    "duplicates": ("duplicate", "near_duplicate"),
    "caption_quality": ("short_caption",),
    "perplexity": ("degenerate_caption",),
    "agreement": ("wrong_caption",),
    "conversation": ("malformed_conversation",),
    "leakage": ("leaked_test_clip",),
}


def with_ids(pools: dict[str, list[dict]]) -> tuple[dict[str, list[dict]], int]:
    """The pools with an id of its own for every sample, and how many got one.

    Published annotations repeat ids, write numbers, or have none. The first sample of an id keeps
    it; any other is named by its place, `pool#number`.
    """
    named, known, count = {}, set(), 0
    own = {sample["id"] for samples in pools.values() for sample in samples if _has_id(sample)}
    for pool, samples in pools.items():
        named[pool] = []
        for number, sample in enumerate(samples):
            has_own = _has_id(sample) and sample["id"] not in known
            if isinstance(sample, dict) and not has_own:
                name = f"{pool}#{number}"
                while name in own or name in known:
                    name += "'"
                sample, count = {**sample, "id": name}, count + 1
            known |= {sample["id"]} if _has_id(sample) else set()
            named[pool].append(sample)
    return named, count


def _has_id(sample) -> bool:
    return isinstance(sample, dict) and isinstance(sample.get("id"), str)


class Funnel:
    """A pool of samples that goes through filters one after the other.

    pools: {"captions": [sample], "qa": [sample]}. `kept` is what is left of each, `removed` is
    {filter: {sample id: reason}} and `steps` the number left in each pool after each filter.
    """

    def __init__(self, pools: dict[str, list[dict]]):
        self.kept = {name: list(samples) for name, samples in pools.items()}
        self.removed: dict[str, dict[str, str]] = {}
        self.steps = [("raw", self._sizes())]
        for pool, samples in pools.items():
            for number, sample in enumerate(samples):
                _check_form(sample, f"{pool}: #{number}")
        ids = Counter(s["id"] for samples in pools.values() for s in samples)
        if twice := [i for i, count in ids.items() if count > 1]:
            raise ValueError(f"sample id {twice[0]!r} occurs {ids[twice[0]]} times in "
                             f"{' and '.join(pools)}; ids are unique")

    def _sizes(self) -> dict[str, int]:
        return {name: len(samples) for name, samples in self.kept.items()}

    def apply(self, name: str, judge: Callable[[dict], Verdict], pools: Iterable[str] = ()) -> int:
        """Let `judge` decide on each sample of `pools` (default: all). Returns how many it took."""
        out = self.removed[name] = {}
        for pool in pools or self.kept:
            verdicts = [(sample, *judge(sample)) for sample in self.kept[pool]]
            self.kept[pool] = [sample for sample, keep, _ in verdicts if keep]
            out |= {sample["id"]: reason for sample, keep, reason in verdicts if not keep}
        self.steps.append((name, self._sizes()))
        return len(out)

    def videos(self) -> list[str]:
        """The clips that some kept sample still needs, in name order."""
        names = {s.get("video") for samples in self.kept.values() for s in samples}
        return sorted(names - {None})


def _check_form(sample, where: str) -> None:
    """What the filters need of a sample before one of them can look at it. Raises ValueError."""
    if not isinstance(sample, dict):
        raise ValueError(f"{where}: {sample!r:.60} is no JSON object")
    for key, is_needed in (("id", True), ("video", False)):
        value = sample.get(key)
        if (is_needed or value is not None) and not isinstance(value, str):
            raise ValueError(f"{where}: {key} = {value!r:.60} must be a text"
                             + (", one file name: filters look at single clips" * (not is_needed)))


def score_filters(removed: dict[str, dict], truth: dict[str, dict]) -> dict[str, dict]:
    """Precision and recall of each filter, and "overall", against the planted truth.

    removed: {filter: {sample id: reason}} in the order of the filters; truth: {sample id: {"kind",
    "twin"}} where twin is the sample that a planted copy repeats. Precision: how many of the
    removed were planted (of any kind). Recall: how many of the planted of the filter's own kinds
    (`CATCHES`) that had come so far it removed. None where nothing is to be counted.
    Of a clip and its copies either may stay: if the copy did, the original counts as the copy.
    """
    planted = _settle_twins(removed, {i: entry["kind"] for i, entry in truth.items()}, truth)
    scores, gone = {}, set()
    for name, taken in removed.items():
        own = {i for i, kind in planted.items() if kind in CATCHES.get(name, ()) and i not in gone}
        scores[name] = _rates(set(taken), set(taken) & set(planted), own, own & set(taken))
        gone |= set(taken)
    right = gone & set(planted)
    return scores | {"overall": _rates(gone, right, set(planted), right)}


def _settle_twins(removed, planted: dict, truth: dict) -> dict:
    """Where a copy stayed and its original went as a duplicate, the original is the copy."""
    duplicates = removed.get("duplicates", ())
    for copy, entry in truth.items():
        if entry.get("twin") in duplicates and copy not in duplicates:
            kind = planted.pop(copy)
            planted.setdefault(entry["twin"], kind)
    return planted


def _rates(taken: set, right: set, own: set, found: set) -> dict:
    return {
        "removed": len(taken),
        "precision": len(right) / len(taken) if taken else None,
        "planted": len(own),
        "recall": len(found) / len(own) if own else None,
    }
