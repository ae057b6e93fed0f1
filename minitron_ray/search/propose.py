"""`propose`: which shapes a cohort of trials tries, from what is known of the cohorts before.

A function of its arguments alone: the Optuna study is built anew in memory for each cohort, its
sampler seeded by the experiment's seed and the cohort, so that neither the order in which trials
end, nor their number at a time, nor a kill changes what is tried.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from minitron_ray.core.fingerprint import digest
from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.search.sampler import LearningSampler, OrderedSampler, SearchSampler
from minitron_ray.search.samplers.exhaustive import Exhaustive

if TYPE_CHECKING:
    from optuna import Study

MINIMIZE: Final = "minimize"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What became of a trial of an earlier cohort."""

    candidate_id: str
    rungs: tuple[tuple[int, float], ...] = ()
    """(distillation tokens, validation loss), rising; without any (a failed trial) the shape is only
    not tried again."""
    completed: bool = False
    values: tuple[float, ...] = ()
    """A value for each of the sampler's objectives: of a completed trial, and where they are two, of a
    stopped one at its last rung."""


def sampler_for(sampler: SearchSampler, feasible: int, trials: int) -> SearchSampler:
    """The sampler that a search uses: every shape in order where there are trials enough for all."""
    return Exhaustive() if feasible <= trials else sampler


def propose(
    proposals: ShapeProposals,
    sampler: SearchSampler,
    seed: int,
    cohort: int,
    told: Sequence[Told],
    zero_shot: Mapping[str, float],
    count: int,
) -> list[str]:
    """`count` feasible shapes that no trial of `told` had, or all that are left where they are fewer.

    The order of `told` and of `zero_shot` (candidate id to the undistilled cut's loss) does not matter.
    """
    tried = {trial.candidate_id for trial in told}
    if isinstance(sampler, OrderedSampler):
        ordered = sampler.ordered(proposals.feasible, seed)
        return [candidate for candidate in ordered if candidate not in tried][:count]
    assert isinstance(sampler, LearningSampler)
    untried = [candidate for candidate in proposals.feasible if candidate not in tried]
    if len(untried) <= count:
        return untried
    known = sorted((trial for trial in told if trial.rungs), key=lambda trial: trial.candidate_id)
    own_seed = int(digest({"seed": seed, "cohort": cohort})[:8], 16)
    if len(known) < sampler.startup_trials:
        scores = zero_shot if sampler.uses_zero_shot else {}
        return _unlearned(untried, scores, count, random.Random(own_seed))
    study = _study(proposals, sampler, own_seed, known)
    return _asked(study, proposals, set(untried), count)


def _unlearned(
    untried: Sequence[str], scores: Mapping[str, float], count: int, lot: random.Random
) -> list[str]:
    """Half of them the best of `scores`, which may mislead; the others by lot."""
    scored = sorted((scores[candidate], candidate) for candidate in untried if candidate in scores)
    best = [candidate for _, candidate in scored[: (count + 1) // 2]]
    others = [candidate for candidate in untried if candidate not in best]
    return best + lot.sample(others, count - len(best))


def _study(proposals: ShapeProposals, sampler: LearningSampler, seed: int, known: Sequence[Told]) -> Study:
    """In memory, with all that is known told."""
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    count, distributions = len(sampler.objectives), proposals.distributions()
    study = optuna.create_study(sampler=sampler.build(seed), directions=[MINIMIZE] * count)
    for trial in known:
        # Of a front's samplers only complete trials count, so a stopped one stands for what it reached.
        complete = trial.completed or (count > 1 and len(trial.values) == count)
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if complete else TrialState.PRUNED,
                values=trial.values if complete else None,
                params=proposals.parameters(trial.candidate_id),
                distributions=distributions,
                intermediate_values=dict(trial.rungs),
            )
        )
    return study


def _asked(study: Study, proposals: ShapeProposals, untried: set[str], count: int) -> list[str]:
    """Asks until `count` of `untried` are found: what is asked for, or the nearest to it.

    Few combinations of sizes are inside a budget: to ask till one is hit takes hundreds of times as
    long, and to tell the sampler of each that is not drowns the results.
    """
    from optuna.trial import TrialState

    found: list[str] = []
    while len(found) < count:
        trial = study.ask()
        proposals(trial)
        candidate_id = proposals.nearest(trial.params, untried)
        if proposals.parameters(candidate_id) != trial.params:
            study.tell(trial, state=TrialState.FAIL)  # which samplers pass over
            study.enqueue_trial(proposals.parameters(candidate_id))
            proposals(study.ask())  # is left running: the sampler keeps its distance
        untried.remove(candidate_id)
        found.append(candidate_id)
    return found


__all__ = ["Told", "propose", "sampler_for"]
