"""Medians, and how sure they are, without assuming how times are distributed."""

import math
import random
import statistics
from collections.abc import Sequence

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
