"""Medians, and how sure they are, without assuming how times are distributed."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SURE = 0.95


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the median of what values were drawn from lies, 95 % sure; None of fewer than six.

    The k-th smallest and the k-th largest, for the largest k that fair coins allow: the median is
    outside if fewer than k of n fall on one side, which has the probability
    2 sum_{i<k} C(n, i) / 2^n.
    """
    n = len(values)
    k, outside = 0, 2 / 2**n
    while outside <= 1 - SURE:
        k += 1
        outside += 2 * math.comb(n, k) / 2**n
    if k == 0:
        return None
    ordered = sorted(values)
    return ordered[k - 1], ordered[-k]


def ratio_interval(
    before: Sequence[float], after: Sequence[float], draws: int = 2000
) -> tuple[float, float]:
    """Where median(after) / median(before) lies, 95 % sure, by the bootstrap; the same each time.

    Efron, Tibshirani, An introduction to the bootstrap, 1993.
    """
    chance = random.Random(0)
    ratios = sorted(
        statistics.median(chance.choices(after, k=len(after)))
        / statistics.median(chance.choices(before, k=len(before)))
        for _ in range(draws)
    )
    edge = round(draws * (1 - SURE) / 2)
    return ratios[edge], ratios[-1 - edge]


@dataclass(frozen=True)
class Fit:
    """y = scale x^power."""

    scale: float
    power: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The power law through the larger half of the points, by least squares of logarithms.

    What does not grow weighs on the smaller half. None of fewer than two points, or if one is 0.
    """
    pairs = sorted(zip(x, y, strict=True))
    pairs = pairs[min(len(pairs) // 2, max(0, len(pairs) - 2)) :]
    if len(pairs) < 2 or min(min(pair) for pair in pairs) <= 0:
        return None
    logs = [(math.log(a), math.log(b)) for a, b in pairs]
    u, v = (statistics.fmean(column) for column in zip(*logs, strict=True))
    spread = sum((a - u) ** 2 for a, _ in logs)
    if not spread:
        return None
    power = sum((a - u) * (b - v) for a, b in logs) / spread
    return Fit(math.exp(v - power * u), power)
