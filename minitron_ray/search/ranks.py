"""Whether one measurement orders students as another does: Kendall's tau-b with its p-value."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """`tau` is 1 where both orders are the same and -1 where one is the other reversed."""

    tau: float
    n: int
    p_value: float
    """Chance of a tau at least as far from zero if the orders had nothing to do with each other: exact
    where no two figures are equal, by the normal approximation with Kendall's correction otherwise."""


def agreement(first: Sequence[float], second: Sequence[float]) -> Agreement | None:
    """Of two lists of figures for the same things; None where either has no order at all.

    Raises ValueError for lists of different lengths.
    """
    tau = kendall_tau(first, second)
    if tau is None:
        return None
    n = len(first)
    if len(set(first)) == len(set(second)) == n:
        p_value = _exact(round((1 - tau) / 2 * math.comb(n, 2)), n)
    else:
        p_value = _normal(_concordance(first, second)[0], first, second)
    return Agreement(tau=tau, n=n, p_value=p_value)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two lists of figures for the same things; None where either has no order at all."""
    agreeing, untied_first, untied_second = _concordance(first, second)
    if not untied_first or not untied_second:
        return None
    return agreeing / math.sqrt(untied_first * untied_second)


def _concordance(first: Sequence[float], second: Sequence[float]) -> tuple[int, int, int]:
    """Pairs in the same order less pairs in the other; pairs with an order in the first, in the second."""
    agreeing = untied_first = untied_second = 0
    pairs = zip(
        map(float, first), map(float, second), strict=True
    )  # numpy's numbers compare to numpy's bools
    for (a, b), (c, d) in combinations(pairs, 2):
        x, y = (a > c) - (a < c), (b > d) - (b < d)
        agreeing += x * y
        untied_first += x != 0
        untied_second += y != 0
    return agreeing, untied_first, untied_second


def _exact(inversions: int, n: int) -> float:
    """Two-sided, over all n! orders: how many have at most so many inversions (Kendall 1938), in integers."""
    fewest = min(inversions, math.comb(n, 2) - inversions)
    counts = [1]  # by inversions, of the orders of one thing
    for size in range(2, n + 1):
        # The next thing stands behind 0 to size - 1 others: a running sum over so many counts.
        sums = list(accumulate(counts + [0] * (size - 1)))
        counts = [total - (sums[at - size] if at >= size else 0) for at, total in enumerate(sums)]
        del counts[fewest + 1 :]
    return min(1.0, 2 * sum(counts[: fewest + 1]) / math.factorial(n))


def _normal(agreeing: int, first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided, with the variance of Kendall (1970, §4.4) for equal figures in either list."""
    n = len(first)
    ties = [list(Counter(values).values()) for values in (first, second)]
    singles = [sum(t * (t - 1) * (2 * t + 5) for t in groups) for groups in ties]
    pairs = [sum(t * (t - 1) for t in groups) for groups in ties]
    triples = [sum(t * (t - 1) * (t - 2) for t in groups) for groups in ties]
    variance = (n * (n - 1) * (2 * n + 5) - sum(singles)) / 18
    variance += math.prod(pairs) / (2 * n * (n - 1))
    if n > 2:
        variance += math.prod(triples) / (9 * n * (n - 1) * (n - 2))
    return math.erfc(abs(agreeing) / math.sqrt(2 * variance)) if variance > 0 else 1.0
