"""What a search has taught: how ranks moved, which sizes did well, which axes mattered."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean, median
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from minitron_ray.search.choice import Interval, intervals, standings
from minitron_ray.search.ranks import Agreement, agreement

FEWEST: Final = 6
"""Trials below which no importance is given: a good third of two, and four others."""
_GOOD: Final = 0.25
"""Share of the trials that an axis is to explain, two at least (target quantile of PED-ANOVA)."""

Comparing = Literal["rung", "last", "zero_shot"]
Over = Literal["search", "search and random", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One candidate at its rungs: sizes by axis, and losses of each validation sequence by tokens."""

    candidate_id: str
    sizes: Mapping[str, float]
    losses: Mapping[int, NDArray[np.float64]]

    def loss(self, tokens: int) -> float:
        """Mean over the sequences. Raises KeyError for a rung that it did not reach."""
        return float(self.losses[tokens].mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAgreement:
    """How well one measurement foretells the order of another, over those that have both."""

    comparing: Comparing
    """`rung` with the next one, any rung with the `last`, or the `zero_shot` losses with a rung."""
    from_tokens: int
    to_tokens: int
    agreement: Agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeLesson:
    """The trials that had one size on one axis, at one rung."""

    axis: str
    size: float
    tokens: int
    trials: int
    best_loss: float
    mean_loss: float
    dead_zone: bool
    """Two trials or more, all of them in the worse half and none tied with the rung's best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """`loser` led `winner` at one rung, and was behind it at the last one that both reached."""

    winner: str
    loser: str
    from_tokens: int
    to_tokens: int
    before: Interval
    """winner's loss less loser's at `from_tokens`: above zero."""
    after: Interval
    """The same at `to_tokens`: below zero."""

    @property
    def certain(self) -> bool:
        """Whether the two were told apart both times."""
        return not self.before.tied and not self.after.tied


def rank_agreements(courses: Sequence[Course], zero_shot: Mapping[str, float]) -> Iterator[RankAgreement]:
    """Only where two candidates or more have both; those that halving stopped have no later rungs."""
    rungs = rungs_of(courses)
    pairs: list[tuple[Comparing, int, int]] = [("rung", a, b) for a, b in pairwise(rungs)]
    pairs += [("last", a, rungs[-1]) for a in rungs[:-1]]
    for comparing, a, b in pairs:
        both = [course for course in courses if a in course.losses and b in course.losses]
        found = agreement([course.loss(a) for course in both], [course.loss(b) for course in both])
        if found:
            yield RankAgreement(comparing=comparing, from_tokens=a, to_tokens=b, agreement=found)
    for tokens in rungs:
        both = [c for c in courses if c.candidate_id in zero_shot and tokens in c.losses and tokens > 0]
        guesses = [zero_shot[course.candidate_id] for course in both]
        found = agreement(guesses, [course.loss(tokens) for course in both])
        if found:
            yield RankAgreement(comparing="zero_shot", from_tokens=0, to_tokens=tokens, agreement=found)


def populations(trials: Sequence[Course], drawn: Sequence[Course]) -> Iterator[tuple[Over, list[Course]]]:
    """Over whom ranks can be compared: the search's trials, and where shapes were `drawn` by lot and trained to
    the end, both together and those alone.

    Trials at late rungs are those that halving let pass, which tells nothing of the others' ranks there;
    only what was drawn alone is unselected. A candidate that is a trial and was drawn counts once, with the
    course that has more rungs.
    """
    yield "search", list(trials)
    if drawn:
        merged = {course.candidate_id: course for course in trials}
        for course in drawn:
            known = merged.get(course.candidate_id)
            if known is None or len(course.losses) > len(known.losses):
                merged[course.candidate_id] = course
        yield "search and random", [merged[name] for name in sorted(merged)]
        yield "random", list(drawn)


def size_lessons(courses: Sequence[Course], *, seed: int) -> Iterator[SizeLesson]:
    """Every size of every axis that differs among the candidates, at every rung."""
    for tokens in rungs_of(courses):
        there = {course.candidate_id: course for course in courses if tokens in course.losses}
        placed = standings({name: course.losses[tokens] for name, course in there.items()}, seed=seed)
        losses = {standing.name: standing.loss for standing in placed}
        tied = {standing.name for standing in placed if standing.tied}
        middle = median(losses.values())
        for axis in axes_of(courses):
            of_size: dict[float, list[str]] = defaultdict(list)
            for name, course in there.items():
                of_size[course.sizes[axis]].append(name)
            for size, names in sorted(of_size.items()):
                best = min(losses[name] for name in names)
                yield SizeLesson(
                    axis=axis,
                    size=size,
                    tokens=tokens,
                    trials=len(names),
                    best_loss=best,
                    mean_loss=fmean(losses[name] for name in names),
                    dead_zone=len(names) > 1 and best > middle and tied.isdisjoint(names),
                )


def flips(courses: Sequence[Course], *, seed: int, most: int = 200) -> list[Flip]:
    """Pairs whose order at a rung was not that of the last rung both reached: those of the largest swings,
    `most` of them, and of these the certain ones first."""
    means = {one.candidate_id: {tokens: one.loss(tokens) for tokens in one.losses} for one in courses}
    pairs: list[tuple[float, str, str, int, int]] = []
    for a, b in combinations(sorted(means), 2):
        common = sorted(means[a].keys() & means[b].keys())
        for tokens in common[:-1]:
            before, after = (means[a][at] - means[b][at] for at in (tokens, common[-1]))
            if before * after < 0:
                won, lost = (a, b) if after < 0 else (b, a)
                pairs.append((-abs(after - before), won, lost, tokens, common[-1]))
    if not pairs:
        return []
    pairs = sorted(pairs)[:most]
    losses = {course.candidate_id: course.losses for course in courses}
    columns = [losses[won][at] - losses[lost][at] for _, won, lost, *rungs in pairs for at in rungs]
    found = iter(intervals(np.stack(columns, axis=1), seed=seed))
    flipped = [
        Flip(
            winner=won,
            loser=lost,
            from_tokens=tokens,
            to_tokens=last,
            before=next(found),
            after=next(found),
        )
        for _, won, lost, tokens, last in pairs
    ]
    return sorted(flipped, key=lambda flip: not flip.certain)


def importances(courses: Sequence[Course], tokens: int) -> dict[str, float]:
    """Share of each axis in what sets the best quarter apart at a rung (PED-ANOVA, Watanabe et al. 2023).

    Sizes count by their place in the order of those tried. Nothing below FEWEST trials, or where only
    one axis differs.
    """
    there = [course for course in courses if tokens in course.losses]
    axes = axes_of(there)
    if len(there) < FEWEST or len(axes) < 2:
        return {}
    import optuna
    from optuna.distributions import BaseDistribution, IntDistribution

    places = {
        axis: {size: at for at, size in enumerate(sorted({course.sizes[axis] for course in there}))}
        for axis in axes
    }
    ranges: dict[str, BaseDistribution] = {axis: IntDistribution(0, len(places[axis]) - 1) for axis in axes}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study()
        for course in there:
            values = {axis: places[axis][course.sizes[axis]] for axis in axes}
            loss = course.loss(tokens)
            study.add_trial(optuna.create_trial(params=values, distributions=ranges, value=loss))
        good = max(_GOOD, 2 / len(there))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=good)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {axis: found[axis] for axis in axes if math.isfinite(found[axis])}


def axes_of(courses: Iterable[Course]) -> list[str]:
    """The axes on which the candidates differ."""
    seen: dict[str, set[float]] = defaultdict(set)
    for course in courses:
        for axis, size in course.sizes.items():
            seen[axis].add(size)
    return [axis for axis, sizes in seen.items() if len(sizes) > 1]


def rungs_of(courses: Iterable[Course]) -> list[int]:
    """Tokens of the rungs that any candidate reached, ascending."""
    return sorted({tokens for course in courses for tokens in course.losses})
