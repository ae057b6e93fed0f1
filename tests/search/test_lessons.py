"""Lessons of small searches whose answers are known beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from minitron_ray.search.lessons import (
    FEWEST,
    Course,
    axes_of,
    flips,
    importances,
    populations,
    rank_agreements,
    size_lessons,
)

HARDNESS = np.random.default_rng(0).normal(0, 1, 24)
HARDNESS -= HARDNESS.mean()


def course(name: str, losses: Mapping[int, float], noise: float = 0.001, **sizes: float) -> Course:
    """A candidate with exactly these mean losses at its rungs, told from others 0.01 away."""
    draw = np.random.default_rng([ord(letter) for letter in name])
    found = {}
    for tokens, loss in losses.items():
        values = HARDNESS + draw.normal(0, noise, len(HARDNESS))
        found[tokens] = values - values.mean() + loss
    return Course(candidate_id=name, sizes=sizes or {"layers": 1}, losses=found)


def grid() -> list[Course]:
    """4 x 4 shapes: each step in layers is worth 0.5, each step in mlp 0.01."""
    return [
        course(f"{layers}-{mlp}", {100: 3 + 0.5 * layers + 0.01 * mlp}, layers=20 + layers, mlp=64 * mlp)
        for layers, mlp in itertools.product(range(4), range(1, 5))
    ]


def test_sizes_are_summed_up_by_axis() -> None:
    lessons = {(one.axis, one.size): one for one in size_lessons(grid(), seed=0)}
    assert len(lessons) == 8 and {one.tokens for one in lessons.values()} == {100}
    layers, mlp = lessons["layers", 22], lessons["mlp", 192]
    assert (layers.trials, layers.best_loss, layers.mean_loss) == (
        4, pytest.approx(3 + 1 + 0.01), pytest.approx(3 + 1 + 0.025),
    )  # fmt: skip
    assert (mlp.trials, mlp.best_loss) == (4, pytest.approx(3 + 0.03))
    assert mlp.mean_loss == pytest.approx(3 + 0.75 + 0.03)


def test_dead_zones_are_sizes_whose_every_trial_is_in_the_worse_half() -> None:
    dead = {(one.axis, one.size) for one in size_lessons(grid(), seed=0) if one.dead_zone}
    assert dead == {("layers", 22), ("layers", 23)}


def test_one_trial_or_a_tie_makes_no_dead_zone() -> None:
    single = [
        course("a", {1: 3.0}, layers=1),
        course("b", {1: 3.1}, layers=2),
        course("c", {1: 9.0}, layers=3),
    ]
    assert not any(one.dead_zone for one in size_lessons(single, seed=0))
    noisy = [
        course(name, {1: 3.0 + 0.01 * at}, noise=1.0, layers=1 + at // 2) for at, name in enumerate("abcd")
    ]
    assert not any(one.dead_zone for one in size_lessons(noisy, seed=0))


def test_the_axis_that_decides_is_the_important_one() -> None:
    found = importances(grid(), 100)
    assert found["layers"] > 0.8 and sum(found.values()) == pytest.approx(1)
    turned = [
        Course(
            candidate_id=one.candidate_id,
            sizes={"layers": one.sizes["mlp"], "mlp": one.sizes["layers"]},
            losses=one.losses,
        )
        for one in grid()
    ]
    assert importances(turned, 100)["mlp"] > 0.8


def test_no_importance_of_few_trials_or_one_axis() -> None:
    assert importances(grid()[: FEWEST - 1], 100) == {} and importances(grid(), 50) == {}
    one_axis = [course(f"{at}", {100: 3.0 + at}, layers=at, mlp=1) for at in range(8)]
    assert axes_of(one_axis) == ["layers"] and importances(one_axis, 100) == {}


def test_ranks_between_rungs_over_those_that_reached_both() -> None:
    courses = [
        course("a", {0: 5.0, 10: 4.0, 20: 3.0}),
        course("b", {0: 5.1, 10: 4.1, 20: 3.1}),
        course("c", {0: 5.2, 10: 3.9, 20: 3.2}),
        course("d", {0: 5.3, 10: 4.5}),
    ]
    zero_shot = {"a": 6.0, "b": 7.0, "c": 5.0, "x": 1.0}
    found = {
        (one.comparing, one.from_tokens, one.to_tokens): (one.agreement.tau, one.agreement.n)
        for one in rank_agreements(courses, zero_shot)
    }
    assert found == {
        ("rung", 0, 10): (pytest.approx((4 - 2) / 6), 4),  # c overtakes a and b
        ("rung", 10, 20): (pytest.approx((1 - 2) / 3), 3),
        ("last", 0, 20): (1.0, 3),
        ("last", 10, 20): (pytest.approx((1 - 2) / 3), 3),
        ("zero_shot", 0, 10): (1.0, 3),
        ("zero_shot", 0, 20): (pytest.approx((1 - 2) / 3), 3),
    }


def test_a_candidate_that_is_a_trial_and_drawn_counts_once_with_its_longer_course() -> None:
    trials = [course("a", {0: 5.0, 10: 4.0, 20: 3.0}), course("b", {0: 5.1, 10: 4.1})]
    drawn = [course("a", {0: 5.0, 10: 4.0, 20: 3.0}), course("b", {0: 5.1, 10: 4.1, 20: 3.1})]
    drawn.append(course("c", {0: 5.2, 10: 4.2, 20: 3.2}))
    found = dict(populations(trials, drawn))
    assert list(found) == ["search", "search and random", "random"]
    assert found["search"] == trials and found["random"] == drawn
    merged = found["search and random"]
    assert [one.candidate_id for one in merged] == ["a", "b", "c"]
    assert merged[0] is trials[0] and merged[1] is drawn[1], "as trained to the end"
    assert dict(populations(trials, [])) == {"search": trials}


def test_flips_are_pairs_that_changed_places() -> None:
    courses = [
        course("a", {0: 5.0, 10: 4.0, 20: 3.30}),
        course("b", {0: 5.5, 10: 4.2, 20: 3.20}),
        course("c", {0: 5.6, 10: 4.3}),
    ]
    found = flips(courses, seed=0)
    assert [(one.winner, one.loser, one.from_tokens, one.to_tokens) for one in found] == [
        ("b", "a", 0, 20), ("b", "a", 10, 20),
    ]  # fmt: skip
    assert found[0].before.difference == pytest.approx(0.5)
    assert found[0].after.difference == pytest.approx(-0.1)
    assert all(one.certain for one in found)
    assert len(flips(courses, seed=0, most=1)) == 1 and flips(courses[:1], seed=0) == []


def test_a_flip_within_the_error_bars_is_not_certain() -> None:
    """Of the same swing, the pair that the sequences tell apart comes first."""
    courses = [
        course("a", {0: 5.0, 10: 4.01}, noise=0.3),
        course("b", {0: 5.5, 10: 4.00}, noise=0.3),
        course("c", {0: 7.0, 10: 6.5}),
        course("d", {0: 7.1, 10: 6.4}),
    ]
    found = flips(courses, seed=0)
    assert [(one.winner, one.certain) for one in found] == [("d", True), ("b", False)]
