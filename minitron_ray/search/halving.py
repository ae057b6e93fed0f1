"""Synchronous successive halving: which trials of a cohort go on past a rung, and which end there.

At a rung all trials of a cohort are waited for, then the best go on (Jamieson & Talwalkar 2016,
algorithm 1). Asynchronous halving decides on whoever came first, so its winner depends on timing;
here the decisions are a function of the losses alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

State = Literal["running", "waiting", "stopped", "completed", "failed"]

ENDED: Final = ("stopped", "completed", "failed")
_FEWEST: Final = 4
"""Trials of a cohort at the least, where it is chosen by rule: they run side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Halving:
    """The rule of a search."""

    rungs: tuple[int, ...]
    """Tokens at which a trial reports, ascending; the last one ends it."""
    reduction: float | None
    """One in so many goes on past a rung; None: all."""
    keep: int = 1
    """So many go on at the least."""

    def going_on(self, reported: int) -> int:
        """How many of so many trials go on past a rung."""
        if self.reduction is None:
            return reported
        return min(reported, max(self.keep, math.floor(reported / self.reduction)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What is decided of a trial: `waiting` at, or `stopped` after, a rung of so many tokens."""

    state: State
    tokens: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def decide(
    cohort: Sequence[str],
    losses: Mapping[str, Mapping[int, float]],
    failed: Collection[str],
    rule: Halving,
    costs: Mapping[str, float] | None = None,
) -> dict[str, Fate]:
    """The fate of every trial, from its losses by tokens. Losses beyond a rung that stopped it count for nothing.

    A failed trial counts at the rungs that it reached. With `costs` (a second figure to be made small)
    the order at a rung is that of non-domination, then of loss; equal ones go by name.
    """
    fates = dict.fromkeys(cohort, Fate(state="running"))
    alive = list(cohort)
    for rung in rule.rungs:
        reported = [name for name in alive if rung in losses.get(name, {})]
        missing = [name for name in alive if name not in reported]
        fates |= {name: Fate(state="failed") for name in missing if name in failed}
        if rung == rule.rungs[-1]:
            return fates | {name: Fate(state="completed", tokens=rung) for name in reported}
        if rule.reduction is None:
            continue
        if any(name not in failed for name in missing):
            return fates | {name: Fate(state="waiting", tokens=rung) for name in reported}
        ordered = in_order({name: losses[name][rung] for name in reported}, costs)
        alive = ordered[: rule.going_on(len(ordered))]
        fates |= {name: Fate(state="stopped", tokens=rung) for name in ordered[len(alive) :]}
    return fates


def in_order(losses: Mapping[str, float], costs: Mapping[str, float] | None = None) -> list[str]:
    """Best first: by loss, or with `costs` by rank of non-domination and then loss; equal ones by name."""
    ranks = dict.fromkeys(losses, 0) if costs is None else front_ranks(losses, costs)
    return sorted(losses, key=lambda name: (ranks[name], losses[name], name))


def front_ranks(losses: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, int]:
    """0 for those that no other beats in one figure without losing in the other (the Pareto front), 1
    for those that only these beat, and so on."""
    ranks: dict[str, int] = {}
    left = sorted(losses, key=lambda name: (losses[name], costs[name]))
    while left:
        front: list[str] = []
        for name in left:  # by rising loss: only a lower cost, or both figures equal, keeps one on the front
            last = front[-1] if front else None
            equal = last is not None and (losses[last], costs[last]) == (losses[name], costs[name])
            if last is None or costs[name] < costs[last] or equal:
                front.append(name)
        ranks |= dict.fromkeys(front, 1 + max(ranks.values(), default=-1))
        left = [name for name in left if name not in front]
    return ranks


def cohort_size(
    trials: int, rungs: int, reduction: float | None, keep: int, learns: bool, given: int | None = None
) -> int:
    """How many trials are proposed together and halved among themselves.

    `given`, at most all of them. Without: all of them where the sampler does not learn from results;
    else as few as halving down to `keep` at the last rung needs (at least four), so that it learns
    often, spread evenly over the trials. Where nothing is halved, `keep` decides nothing.
    """
    if given is not None:
        return min(given, trials)
    if not learns:
        return trials
    needed = math.ceil((reduction or 2.0) ** (rungs - 1) * (keep if reduction else 1) - 1e-9)
    cohorts = max(1, trials // max(_FEWEST, needed))
    return math.ceil(trials / cohorts)
