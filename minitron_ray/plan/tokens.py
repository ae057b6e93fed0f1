"""How many tokens each part of an experiment sees, in whole optimizer steps, and how many trials get how far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from minitron_ray.experiment import Correction, Distill, Experiment, Retrain
from minitron_ray.search.halving import Halving, cohort_size
from minitron_ray.search.propose import sampler_for
from minitron_ray.search.sampler import LearningSampler


def kept_students(experiment: Experiment) -> int:
    """How many students are distilled, ties aside: those that the search keeps, or the one of a fixed shape."""
    return experiment.search.fewest_kept if experiment.search is not None else 1


def steps(tokens: int, batch: int, sequence_length: int) -> int:
    """Optimizer steps that see at least `tokens`."""
    return math.ceil(tokens / (batch * sequence_length))


def tokens_seen(tokens: int, batch: int, sequence_length: int) -> int:
    """`tokens` rounded up to whole optimizer steps: what training really sees."""
    return steps(tokens, batch, sequence_length) * batch * sequence_length


def trainings(experiment: Experiment) -> list[Retrain | Distill | Correction]:
    """What trains in the experiment: the teacher's correction, the trials, the distillation, or none of them."""
    retrain = None if experiment.search is None else experiment.search.retrain
    parts = (experiment.teacher.correction, retrain, experiment.distill)
    return [part for part in parts if part is not None]


def sequences_needed(experiment: Experiment) -> int:
    """Those that are held out and those that the longest training sees, none of them twice."""
    data = experiment.data
    seen = (tokens_seen(part.tokens, part.batch, data.sequence_length) for part in trainings(experiment))
    return data.calibration + data.validation + max(seen, default=0) // data.sequence_length


def distilled_tokens(experiment: Experiment) -> int:
    """Tokens that each chosen student sees in its distillation; 0 where there is none."""
    distill = experiment.distill
    if distill is None:
        return 0
    return tokens_seen(distill.tokens, distill.batch, experiment.data.sequence_length)


def rung_tokens(experiment: Experiment) -> tuple[int, ...]:
    """Tokens after which a trial is measured, ascending; the last is all of its tokens."""
    search, length = experiment.searched, experiment.data.sequence_length
    retrain, reduction = search.retrain, search.halving.reduction if search.halving else 2.0
    found = {
        tokens_seen(math.ceil(retrain.tokens / reduction**k), retrain.batch, length)
        for k in range(retrain.rungs)
    }
    return tuple(sorted(found))


def halving_rule(experiment: Experiment) -> Halving:
    """Where trials report, and how many go on."""
    search = experiment.searched
    return Halving(
        rungs=rung_tokens(experiment),
        reduction=search.halving.reduction if search.halving else None,
        keep=search.fewest_kept,
    )


def trials_a_cohort(experiment: Experiment, trials: int, feasible: int | None = None) -> int:
    """How many of `trials` are proposed together; None feasible shapes are more than those."""
    search, rule = experiment.searched, halving_rule(experiment)
    sampler = sampler_for(search.sampler, trials + 1 if feasible is None else feasible, trials)
    given = search.halving.cohort if search.halving else None
    return cohort_size(trials, len(rule.rungs), rule.reduction, rule.keep, sampler.learns, given)


def learns_nothing(experiment: Experiment, trials: int, feasible: int) -> bool:
    """Whether a sampler that learns proposes all of its trials before it knows results enough."""
    sampler = sampler_for(experiment.searched.sampler, feasible, trials)
    if not isinstance(sampler, LearningSampler):
        return False
    *before, _ = cohorts_of(experiment, trials, feasible)
    return sum(before) < sampler.startup_trials


def cohorts_of(experiment: Experiment, trials: int, feasible: int | None = None) -> tuple[int, ...]:
    """How many of `trials` are halved among themselves at a time; `feasible` as in `trials_a_cohort`."""
    size = trials_a_cohort(experiment, trials, feasible)
    return tuple(min(size, trials - start) for start in range(0, trials, size))


def trials_at_rungs(experiment: Experiment, trials: int, feasible: int | None = None) -> tuple[int, ...]:
    """How many of `trials` train up to each rung, where none fails."""
    return reached(halving_rule(experiment), cohorts_of(experiment, trials, feasible))


def cohorts_at_rungs(
    experiment: Experiment, trials: int, feasible: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """The same of each cohort."""
    rule = halving_rule(experiment)
    return tuple(reached(rule, [count]) for count in cohorts_of(experiment, trials, feasible))


def reached(rule: Halving, cohorts: Sequence[int]) -> tuple[int, ...]:
    """How many trials of all cohorts train up to each of the rule's rungs."""
    counts = []
    going = list(cohorts)
    for _ in rule.rungs:
        counts.append(sum(going))
        going = [rule.going_on(count) for count in going]
    return tuple(counts)


def validations_of(distill: Distill | Correction, length: int) -> int:
    """How often a student is measured during its distillation, or the teacher during its correction: at
    intervals, and behind the last step."""
    total = steps(distill.tokens, distill.batch, length)
    return math.ceil(total / interval(distill, distill.validate_every, 4, length))


def interval(distill: Distill | Correction, tokens: int | None, parts: int, length: int) -> int:
    """Optimizer steps between two events of a training: so many tokens, or `parts` times in all."""
    total = steps(distill.tokens, distill.batch, length)
    return max(1, steps(tokens, distill.batch, length) if tokens else total // parts)
