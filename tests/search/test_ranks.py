"""Kendall's tau by hand, and its p-value against all orders and against published figures."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from minitron_ray.search.ranks import agreement, kendall_tau


def test_kendalls_tau() -> None:
    """By hand: pairs in the same order minus pairs in the other, over pairs."""
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx((5 - 1) / 6)
    # One tie on one side: 2 pairs agree, none disagrees, sqrt(3 * 2) for those that are not tied.
    assert kendall_tau([1, 2, 3], [1, 1, 2]) == pytest.approx(2 / math.sqrt(6))
    for first, second in (([], []), ([1], [2]), ([1, 1], [1, 2]), ([1, 2], [3, 3])):
        assert kendall_tau(first, second) is None and agreement(first, second) is None


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7])
def test_the_exact_p_value_counts_all_orders(n: int) -> None:
    """As many of the n! orders as are at least as far from zero."""
    base = list(range(n))
    taus = [kendall_tau(base, order) for order in itertools.permutations(base)]
    for order in random.Random(n).sample(list(itertools.permutations(base)), k=min(6, math.factorial(n))):
        found = agreement(base, order)
        assert found is not None and found.n == n
        assert found.tau == kendall_tau(base, order)
        extreme = sum(abs(tau or 0) >= abs(found.tau) - 1e-12 for tau in taus)
        assert found.p_value == pytest.approx(extreme / len(taus))


def test_with_equal_figures_it_is_the_published_one() -> None:
    """The example of scipy.stats.kendalltau's documentation."""
    found = agreement([12, 2, 1, 12, 2], [1, 4, 7, 1, 0])
    assert found is not None
    assert found.tau == pytest.approx(-0.47140452079103173)
    assert found.p_value == pytest.approx(0.2827454599327748)


def test_exact_and_normal_agree_for_many() -> None:
    """Without equal figures the normal approximation has variance n (n - 1) (2n + 5) / 18."""
    n = 60
    order = random.Random(0).sample(range(n), n)
    second = [0.7 * place + 0.3 * at for at, place in enumerate(order)]
    found = agreement(range(n), second)
    assert found is not None
    score = found.tau * n * (n - 1) / 2
    normal = math.erfc(abs(score) / math.sqrt(2 * n * (n - 1) * (2 * n + 5) / 18))
    assert found.p_value == pytest.approx(normal, rel=0.1)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        agreement([1, 2, 3], [1, 2])
