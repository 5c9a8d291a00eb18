"""How sure a measured share is. Taught in notebook 05."""

from statistics import NormalDist

import numpy as np


def clustered_interval(correct, clusters, level: float = 0.95) -> tuple[float, float]:
    """Interval for the share of `correct` when answers about one clip stand or fall together.

    The cluster-robust variance of the mean (Miller, "Adding Error Bars to Evals", arXiv
    2411.00640, section 2.2) gives the number of independent answers that would be as uncertain,
    between the number of clusters and of answers; with it, Wilson's score interval (1927), which
    stays inside 0..1 and does not shrink to a point at 0 or 1 (Dean & Pagano 2015).
    """
    x = np.asarray(correct, dtype=float)
    if not len(x):
        return 0.0, 1.0
    p, n = x.mean(), len(x)
    _, place = np.unique(np.asarray(clusters).astype(str), return_inverse=True)
    sums = np.bincount(place, x - p)  # of the residuals, by clip
    num = len(sums)
    variance = (sums**2).sum() / n**2 * num / max(num - 1, 1)
    effective = float(np.clip(p * (1 - p) / variance, num, n)) if variance > 0 else num
    z = NormalDist().inv_cdf(0.5 + level / 2)
    middle = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * np.sqrt(p * (1 - p) / effective + (z / effective / 2) ** 2)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))
