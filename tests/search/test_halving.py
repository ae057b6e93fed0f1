"""Halving: who goes on past a rung."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_ray.search.halving import Fate, Halving, cohort_size, decide, front_ranks, in_order

RULE = Halving(rungs=(10, 20, 40), reduction=2)
LOSSES = st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0]), min_size=3, max_size=3)


def states(fates: dict[str, Fate]) -> dict[str, tuple[str, int]]:
    return {name: (fate.state, fate.tokens) for name, fate in fates.items()}


def test_a_bracket_by_hand() -> None:
    losses = {
        "a": {0: 1.0, 10: 4.0},
        "b": {0: 9.0, 10: 2.0, 20: 2.0},
        "c": {10: 1.0, 20: 1.0, 40: 0.5},
        "d": {10: 3.0},
    }
    assert states(decide("abcd", losses, (), RULE)) == {
        "a": ("stopped", 10),
        "b": ("stopped", 20),
        "c": ("completed", 40),
        "d": ("stopped", 10),
    }


def test_everyone_waits_for_the_last_of_the_cohort() -> None:
    losses = {name: {10: float(place)} for place, name in enumerate("abc")}
    fates = states(decide("abcd", losses, (), RULE))
    assert fates == {**dict.fromkeys("abc", ("waiting", 10)), "d": ("running", 0)}


def test_nobody_waits_for_one_that_failed() -> None:
    losses = {name: {10: float(place)} for place, name in enumerate("abc")}
    fates = states(decide("abcd", losses, {"d"}, RULE))
    assert fates == {"a": ("running", 0), "b": ("stopped", 10), "c": ("stopped", 10), "d": ("failed", 0)}


def test_one_that_fails_later_counts_where_it_was() -> None:
    losses = {"a": {10: 1.0}, "b": {10: 2.0, 20: 2.0, 40: 2.0}, "c": {10: 3.0}, "d": {10: 4.0}}
    fates = states(decide("abcd", losses, {"a"}, RULE))
    assert fates["a"] == ("failed", 0) and fates["b"] == ("completed", 40)
    assert fates["c"] == fates["d"] == ("stopped", 10)


def test_losses_of_one_taken_up_again_change_no_decision() -> None:
    losses = {"a": {10: 1.0, 20: 5.0, 40: 5.0}, "b": {10: 2.0, 20: 0.0, 40: 0.0}}
    assert states(decide("ab", losses, (), RULE)) == {"a": ("completed", 40), "b": ("stopped", 10)}


def test_without_reduction_all_run_to_the_end() -> None:
    rule = Halving(rungs=(10, 20), reduction=None)
    losses = {"a": {10: 1.0, 20: 1.0}, "b": {10: 2.0}}
    assert states(decide("ab", losses, (), rule)) == {"a": ("completed", 20), "b": ("running", 0)}


@given(st.lists(LOSSES, min_size=1, max_size=7), st.integers(1, 3), st.randoms())
def test_timing_does_not_decide(table: list[list[float]], keep: int, order: object) -> None:
    """Told in any order, in which only trials that may run on report, the end is the same."""
    rule = Halving(rungs=RULE.rungs, reduction=2, keep=keep)
    cohort = [f"t{number}" for number in range(len(table))]

    def play(choose) -> dict[str, Fate]:  # type: ignore[no-untyped-def]
        told: dict[str, dict[int, float]] = {name: {} for name in cohort}
        while running := [
            name for name, fate in decide(cohort, told, (), rule).items() if fate.state == "running"
        ]:
            name = choose(running)
            rung = rule.rungs[len(told[name])]
            told[name][rung] = table[cohort.index(name)][len(told[name])]
        return decide(cohort, told, (), rule)

    first = play(lambda running: running[0])
    assert first == play(order.choice)  # type: ignore[attr-defined]
    completed = [name for name, fate in first.items() if fate.state == "completed"]
    alive = len(cohort)
    for _ in rule.rungs[:-1]:
        alive = min(alive, max(keep, alive // 2))
    assert len(completed) == alive and all(fate.ended for fate in first.values())


@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1)
)
def test_front_ranks_against_the_definition(points: dict[str, tuple[int, int]]) -> None:
    losses, costs = ({name: float(point[axis]) for name, point in points.items()} for axis in (0, 1))
    ranks = front_ranks(losses, costs)
    assert set(ranks) == set(points)

    def beats(one: str, other: str) -> bool:
        pairs = list(zip(points[one], points[other], strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    for name in points:
        beaten_by = [ranks[other] for other in points if beats(other, name)]
        assert ranks[name] == 1 + max(beaten_by, default=-1)


def test_the_front_goes_on_before_a_lower_loss() -> None:
    losses, costs = {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 5.0, "b": 6.0, "c": 1.0}
    assert in_order(losses, costs) == ["a", "c", "b"]
    assert in_order(losses) == ["a", "b", "c"]
    assert in_order({"b": 1.0, "a": 1.0}) == ["a", "b"]


@pytest.mark.parametrize(
    ("trials", "keep", "learns", "given_size", "expected"),
    [
        (12, 1, True, None, 4),
        (10, 1, True, None, 5),
        (8, 2, True, None, 8),
        (20, 2, True, None, 10),
        (3, 1, True, None, 3),
        (12, 1, False, None, 12),
        (12, 1, True, 6, 6),
        (4, 1, True, 6, 4),
    ],
)
def test_cohorts_by_rule(trials: int, keep: int, learns: bool, given_size: int | None, expected: int) -> None:
    assert cohort_size(trials, 3, 2.0, keep, learns, given_size) == expected


def test_what_is_kept_does_not_size_cohorts_that_nothing_halves() -> None:
    """Proposals follow the cohorts: trials that all end the same way must not depend on `keep`."""
    sizes = {cohort_size(24, 3, None, keep, True) for keep in range(1, 25)}
    assert sizes == {cohort_size(24, 3, 2.0, 1, True)}


def test_halving_by_rule_spends_half_of_the_tokens_or_less() -> None:
    for reduction, rungs, keep in itertools.product((2.0, 3.0, 4.0), (3, 4), (1, 2)):
        size = cohort_size(1000, rungs, reduction, keep, True)
        rule = Halving(
            rungs=tuple(int(100 * reduction**k) for k in range(rungs)), reduction=reduction, keep=keep
        )
        alive, spent, before = size, 0.0, 0
        for rung in rule.rungs:
            spent, before = spent + alive * (rung - before), rung
            alive = rule.going_on(alive)
        assert spent <= 0.5 * size * rule.rungs[-1] * 1.001, (reduction, rungs, keep)
        assert math.isfinite(spent)
