"""The paired bootstrap and ties: coverage by simulation, and figures that follow from the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_ray.search.choice import intervals, keep_best, paired_bootstrap, standings, tied_with_best

SEQUENCES = 32


def covered(differences: np.ndarray, truth: float) -> float:
    """Share of the columns whose interval holds the mean that they were drawn from."""
    found = intervals(differences, seed=0, draws=2000)
    return float(np.mean([one.low <= truth <= one.high for one in found]))


@pytest.mark.parametrize("sequences", [8, 16, 32])
@pytest.mark.parametrize("shape", ["normal", "exponential"])
def test_the_interval_holds_the_truth_as_often_as_it_says(sequences: int, shape: str) -> None:
    """1500 experiments: a share of 0.95 has a standard error of 0.006. Skewed differences come close."""
    draw = np.random.default_rng(7)
    size = (sequences, 1500)
    drawn = draw.normal(0.3, 2.0, size) if shape == "normal" else draw.exponential(1.0, size) - 0.7
    slack = 0.018 if shape == "normal" else 0.03
    assert abs(covered(drawn, 0.3) - 0.95) < slack


def test_it_is_wider_than_the_percentile_interval_that_misses_too_often() -> None:
    """The reason for bootstrap-t: with eight sequences the plain percentiles hold the truth in 90 %."""
    draw = np.random.default_rng(1)
    differences = draw.normal(0.0, 1.0, (8, 800))
    counts = draw.multinomial(8, np.full(8, 1 / 8), size=2000)
    low, high = np.quantile(counts @ differences / 8, [0.025, 0.975], axis=0)
    plain = np.mean((low <= 0) & (high >= 0))
    assert plain < 0.92 < covered(differences, 0.0)


def test_with_many_sequences_it_is_the_interval_of_the_central_limit_theorem() -> None:
    differences = np.random.default_rng(3).normal(0.05, 0.4, 2000)
    found = paired_bootstrap(differences, np.zeros(2000), seed=1)
    error = differences.std(ddof=1) / math.sqrt(2000)
    assert found.difference == pytest.approx(differences.mean())
    assert found.low == pytest.approx(differences.mean() - 1.96 * error, abs=0.06 * error)
    assert found.high == pytest.approx(differences.mean() + 1.96 * error, abs=0.06 * error)


def test_pairing_tells_apart_what_unpaired_losses_do_not() -> None:
    """Sequences differ by 1, students by 0.02: the pairs show it."""
    draw = np.random.default_rng(5)
    hardness = draw.normal(3.5, 1.0, SEQUENCES)
    a = hardness + 0.02 + draw.normal(0, 0.01, SEQUENCES)
    assert not paired_bootstrap(a, hardness, seed=0).tied
    assert paired_bootstrap(a, draw.permutation(hardness), seed=0).tied


@given(st.integers(0, 2**31), st.integers(4, 40), st.floats(-5, 5))
def test_swapping_turns_it_round_and_adding_to_both_changes_nothing(
    seed: int, sequences: int, more: float
) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(2, sequences))
    found, swapped = (paired_bootstrap(*pair, seed=2, draws=500) for pair in ((a, b), (b, a)))
    assert swapped.difference == pytest.approx(-found.difference)
    assert found.low <= found.difference <= found.high
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low), abs=0.5 * a.std())
    moved = paired_bootstrap(a + more, b + more, seed=2, draws=500)
    assert (moved.low, moved.high) == pytest.approx((found.low, found.high))


def test_the_same_seed_gives_the_same_figures_alone_or_among_others() -> None:
    differences = np.random.default_rng(0).normal(size=(SEQUENCES, 600))
    among = intervals(differences, seed=4, draws=500)
    alone, other = (intervals(differences[:, 599:], seed=seed, draws=500)[0] for seed in (4, 5))
    assert (among[599].low, among[599].high) == pytest.approx((alone.low, alone.high), rel=1e-9)
    assert abs(alone.low - other.low) > 1e-6


def test_few_sequences_tell_nothing() -> None:
    for losses in ([1.0], [1.0, 2.0], [1.0, 2.0, 4.0]):
        found = paired_bootstrap(losses, [0.5] * len(losses), seed=0)
        assert (found.low, found.high) == (-math.inf, math.inf) and found.tied
    assert math.isfinite(paired_bootstrap([1.0, 2.0, 4.0, 3.0], [0.5] * 4, seed=0).high)


def test_equal_differences_have_no_spread() -> None:
    found = paired_bootstrap([3.1, 4.1, 5.1], [3.0, 4.0, 5.0], seed=0)
    assert found.low == found.high == found.difference == pytest.approx(0.1)
    assert not found.tied
    assert paired_bootstrap([3.0, 4.0], [3.0, 4.0], seed=0).tied


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], r"shape \(2,\) and \(1,\) are not paired"),
        ([], [], r"shape \(0,\) and \(0,\) are not paired"),
        ([[1.0]], [[1.0]], "are not paired"),
        ([math.nan, 1.0], [1.0, 1.0], "a loss is not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b, seed=0)


def test_a_level_is_a_share() -> None:
    with pytest.raises(ValueError, match="level is 95"):
        paired_bootstrap([1.0, 2.0], [1.0, 1.0], seed=0, level=95)
    narrow, wide = (
        paired_bootstrap(np.arange(9.0), np.arange(9.0)[::-1] ** 1.5, seed=0, level=level)
        for level in (0.5, 0.99)
    )
    assert wide.low < narrow.low < narrow.high < wide.high


def losses_of(*means: float, noise: float = 0.02) -> dict[str, np.ndarray]:
    """Named a, b, ..., with exactly these means over common hard and easy sequences."""
    draw = np.random.default_rng(11)
    hardness = draw.normal(0, 1.0, SEQUENCES)
    found = {}
    for name, mean in zip("abcdef", means, strict=False):
        values = hardness + draw.normal(0, noise, SEQUENCES)
        found[name] = values - values.mean() + mean
    return found


def test_standings_are_ordered_and_ties_marked() -> None:
    placed = standings(losses_of(3.50, 3.40, 3.401, 3.9), seed=0)
    assert [(one.name, one.tied) for one in placed] == [
        ("b", True), ("c", True), ("a", False), ("d", False)
    ]  # fmt: skip
    assert placed[0].behind.difference == 0 and placed[2].behind.difference == pytest.approx(0.1)
    assert placed[3].loss == pytest.approx(3.9)
    assert standings({}, seed=0) == ()
    with pytest.raises(ValueError, match="are not paired"):
        standings({"a": [1.0, 2.0], "b": [1.0]}, seed=0)


def test_equal_losses_go_by_name() -> None:
    same = [1.0, 2.0, 3.0, 5.0]
    assert [one.name for one in standings({"b": same, "a": same}, seed=0)] == ["a", "b"]
    assert tied_with_best({"b": same, "a": same}, seed=0) == ("a", "b")


def test_keep_takes_a_count_or_the_ties() -> None:
    losses = losses_of(3.50, 3.40, 3.401, 3.9)
    assert keep_best(losses, 1, seed=0) == ("b",)
    assert keep_best(losses, 3, seed=0) == ("b", "c", "a")
    assert keep_best(losses, 9, seed=0) == ("b", "c", "a", "d")
    assert keep_best(losses, "ties", seed=0) == tied_with_best(losses, seed=0) == ("b", "c")
    for wrong in ("tie", 0):
        with pytest.raises(ValueError, match=r"keep is .*; give a count of at least 1, or ties"):
            keep_best(losses, wrong, seed=0)


def test_the_truly_best_of_two_is_among_the_ties_as_often_as_the_level_says() -> None:
    """Two students 0.005 apart, 400 searches: the better one may be left out in 2.5 % of them."""
    draw = np.random.default_rng(2)
    kept = 0
    for _ in range(400):
        hardness = draw.normal(0, 1, 24)
        losses = {"good": hardness + draw.normal(0, 0.05, 24), "bad": hardness + draw.normal(0.005, 0.05, 24)}
        kept += "good" in tied_with_best(losses, seed=0, draws=1000)
    assert kept / 400 > 0.96
