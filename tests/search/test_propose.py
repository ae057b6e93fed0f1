"""Proposals as a function of what is known, and what the samplers make of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from minitron_ray.core.units import Choices
from minitron_ray.experiment import Space
from minitron_ray.models.budget import Band, Limits
from minitron_ray.models.families import family_of
from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.search.propose import Told, propose, sampler_for
from minitron_ray.search.sampler import SearchSampler
from minitron_ray.search.samplers.exhaustive import Exhaustive
from minitron_ray.search.samplers.nsga2 import NSGA2
from minitron_ray.search.samplers.random import Random
from minitron_ray.search.samplers.tpe import TPE
from minitron_ray.search.space import enumerate_candidates

CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 96,
    "vocab_size": 256,
    "tie_word_embeddings": True,
}
SAMPLERS = [TPE(), Random(), Exhaustive(), NSGA2(against="parameters", population=4)]


def make_proposals(mlp: Any = "32..96 by 4", tolerance: float = 0.05) -> ShapeProposals:
    family = family_of(CONFIG)
    space = Space(
        layers=Choices.parse("2..8"),
        hidden=Choices.parse([36, 42, 48]),
        heads=Choices.parse([3, 6]),
        mlp=Choices.parse(mlp),
    )
    rows = enumerate_candidates(family, family.read(CONFIG), space, Limits.on(Band.of(90_000, tolerance)))
    return ShapeProposals.of(rows, space, 48)


PROPOSALS = make_proposals()
assert len(PROPOSALS.feasible) > 40, "a space in which there is something to choose"


def loss_of(candidate_id: str) -> float:
    """Least at 6 layers and an MLP of 60."""
    sizes = PROPOSALS.parameters(candidate_id)
    return float((sizes["layers"] - 6) ** 2 / 4 + (sizes["mlp"] - 60) ** 2 / 400)


def completed(candidate_id: str, *more: float) -> Told:
    loss = loss_of(candidate_id)
    return Told(candidate_id=candidate_id, rungs=((8, loss),), completed=True, values=(loss, *more))


def search(
    sampler: SearchSampler,
    trials: int,
    seed: int = 0,
    told_of: Callable[[str], Told] = completed,
    zero_shot: dict[str, float] | None = None,
    cohort: int = 4,
) -> list[str]:
    told: list[Told] = []
    while len(told) < trials:
        number = len(told) // cohort
        told += map(told_of, propose(PROPOSALS, sampler, seed, number, told, zero_shot or {}, cohort))
    return [trial.candidate_id for trial in told]


def front(candidate_id: str) -> Told:
    return completed(candidate_id, float(PROPOSALS.parameters(candidate_id)["hidden"]))


def tell(sampler: SearchSampler) -> Callable[[str], Told]:
    return front if len(sampler.objectives) == 2 else completed


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_only_feasible_shapes_each_once(sampler: SearchSampler) -> None:
    seen = search(sampler, 24, told_of=tell(sampler))
    assert len(seen) == 24 == len(set(seen))
    assert set(seen) <= set(PROPOSALS.feasible)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_all_that_is_left_where_less_is_left_than_asked_for(sampler: SearchSampler) -> None:
    told = [tell(sampler)(name) for name in PROPOSALS.feasible[3:]]
    found = propose(PROPOSALS, sampler, 0, 9, told, {}, 8)
    assert sorted(found) == sorted(PROPOSALS.feasible[:3])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_neither_order_of_results_nor_of_scores_matters(sampler: SearchSampler) -> None:
    told = [tell(sampler)(name) for name in PROPOSALS.feasible[::5]]
    scores = {name: loss_of(name) for name in PROPOSALS.feasible[::2]}
    expected = propose(PROPOSALS, sampler, 0, 2, told, scores, 6)
    for attempt in range(3):
        random.Random(attempt).shuffle(told)
        mixed = dict(random.Random(attempt).sample(list(scores.items()), len(scores)))
        assert propose(PROPOSALS, sampler, 0, 2, told, mixed, 6) == expected


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s.kind != "exhaustive"], ids=lambda s: s.kind)
def test_the_seed_decides(sampler: SearchSampler) -> None:
    assert search(sampler, 12, 0, tell(sampler)) == search(sampler, 12, 0, tell(sampler))
    assert search(sampler, 12, 0, tell(sampler)) != search(sampler, 12, 1, tell(sampler))


def test_a_failed_trial_is_excluded_and_teaches_nothing() -> None:
    told = [completed(name) for name in PROPOSALS.feasible[::6]]
    failed = next(n for n in propose(PROPOSALS, TPE(), 0, 1, told, {}, 4) if n not in PROPOSALS.feasible[::6])
    again = propose(PROPOSALS, TPE(), 0, 1, [*told, Told(candidate_id=failed)], {}, 4)
    assert failed not in again


def mean_loss(sampler: SearchSampler, told_of: Callable[[str], Told] = completed) -> float:
    """Of what is tried after the first cohort, over six seeds."""
    names = [name for seed in range(6) for name in search(sampler, 24, seed, told_of)[4:]]
    return sum(map(loss_of, names)) / len(names)


def test_results_draw_tpe_to_the_optimum() -> None:
    assert mean_loss(TPE()) < 0.8 * mean_loss(Random())


def test_stopped_trials_teach_too_and_failed_ones_do_not() -> None:
    def stopped(candidate_id: str) -> Told:
        return Told(candidate_id=candidate_id, rungs=((8, loss_of(candidate_id)),))

    def failed(candidate_id: str) -> Told:
        return Told(candidate_id=candidate_id)

    assert mean_loss(TPE(), stopped) < 0.8 * mean_loss(TPE(), failed)


def test_the_best_cuts_are_half_of_what_is_tried_first() -> None:
    scores = {name: loss_of(name) for name in PROPOSALS.feasible[1:]}
    best = sorted(scores, key=lambda name: (scores[name], name))[:3]
    first = propose(PROPOSALS, TPE(), 0, 0, [], scores, 6)
    assert first[:3] == best
    assert propose(PROPOSALS, TPE(), 0, 0, [], {}, 6)[:3] != best


@pytest.mark.parametrize("sampler", [Random(), Exhaustive(), NSGA2(against="flops")], ids=lambda s: s.kind)
def test_scores_change_nothing_for_samplers_that_do_not_use_them(sampler: SearchSampler) -> None:
    scores = {name: loss_of(name) for name in PROPOSALS.feasible}
    assert not sampler.uses_zero_shot
    assert propose(PROPOSALS, sampler, 0, 0, [], scores, 6) == propose(PROPOSALS, sampler, 0, 0, [], {}, 6)


def test_random_is_uniform_over_shapes() -> None:
    """Not over sizes: in 40 draws of all shapes, each comes first about as often as any other."""
    firsts = [
        propose(PROPOSALS, Random(), seed, 0, [], {}, 1)[0] for seed in range(40 * len(PROPOSALS.feasible))
    ]
    counts = [firsts.count(name) for name in PROPOSALS.feasible]
    expected = 40.0
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    freedom = len(counts) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_random_does_not_depend_on_the_cohorts() -> None:
    assert search(Random(), 24, cohort=4) == search(Random(), 24, cohort=8)


def test_exhaustive_where_there_are_trials_enough() -> None:
    assert isinstance(sampler_for(TPE(), 12, 12), Exhaustive)
    assert isinstance(sampler_for(TPE(), 13, 12), TPE)
    assert search(Exhaustive(), 12) == list(PROPOSALS.feasible[:12])


def test_nsga2_draws_to_the_front() -> None:
    """Its later shapes are beaten in both figures by fewer others than shapes by lot are."""
    figures = {name: front(name).values for name in PROPOSALS.feasible}

    def better(name: str) -> int:
        mine = figures[name]
        return sum(
            all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine
            for other in figures.values()
        )

    def beaten(sampler: SearchSampler) -> float:
        names = [name for seed in range(6) for name in search(sampler, 24, seed, front)[8:]]
        return sum(map(better, names)) / len(names)

    assert beaten(NSGA2(against="parameters", population=4)) < 0.9 * beaten(Random())


def test_nsga2_learns_from_stopped_trials_by_their_values() -> None:
    sampler = NSGA2(against="parameters", population=4)

    def stopped(candidate_id: str) -> Told:
        told = front(candidate_id)
        return Told(candidate_id=candidate_id, rungs=told.rungs, values=told.values)

    assert search(sampler, 16, told_of=stopped) == search(sampler, 16, told_of=front)


def test_nearest_is_the_shape_with_the_fewest_steps() -> None:
    name = PROPOSALS.feasible[10]
    assert PROPOSALS.nearest(PROPOSALS.parameters(name), PROPOSALS.feasible) == name
    others = set(PROPOSALS.feasible) - {name}
    found = PROPOSALS.parameters(PROPOSALS.nearest(PROPOSALS.parameters(name), others))
    wanted, sizes = PROPOSALS.parameters(name), dict(PROPOSALS.axes)

    def steps(values: dict[str, Any]) -> float:
        return sum(
            abs(axis.index(values[n]) - axis.index(wanted[n])) / (len(axis) - 1) for n, axis in sizes.items()
        )

    assert steps(found) == pytest.approx(min(steps(PROPOSALS.parameters(other)) for other in others))


def test_ratios_and_uneven_sizes_can_be_proposed() -> None:
    proposals = make_proposals(mlp={"ratio": [0.75, 1, 1.5, 2]}, tolerance=0.3)
    told = [
        Told(candidate_id=name, rungs=((8, 1.0),), completed=True, values=(1.0,))
        for name in proposals.feasible[:4]
    ]
    found = propose(proposals, TPE(), 0, 1, told, {}, 4)
    assert len(set(found)) == 4 and set(found) <= set(proposals.feasible[4:])
