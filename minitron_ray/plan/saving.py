"""What is saved, by arithmetic: by a search that runs its teacher once, and by a family that is cut instead
of trained."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from minitron_ray.distillation.signal import StoredSignal
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.cost import body_flops, forward_flops, head_flops, training_flops
from minitron_ray.plan.signal import choose_signal
from minitron_ray.plan.students import costliest_first
from minitron_ray.plan.tokens import distilled_tokens, reached, rung_tokens, tokens_seen, trials_at_rungs
from minitron_ray.search.halving import Halving, cohort_size

if TYPE_CHECKING:
    from minitron_ray.plan.plan import Plan

SCRATCH_TOKENS: Final = 40
"""Tokens of a model trained from scratch over those of a distilled one (paper §4.1: 3.8T over 94B)."""
COMPARED_TRIALS: Final = 20
"""A search of so many is shown beside a plan's own: how the saving grows."""
USUAL_RUNGS: Final = 4
USUAL_REDUCTION: Final = 2.0
"""Of a search that asks for no halving: what halving would save, by a half at 1/8, 1/4 and 1/2 of the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSaving:
    """Operations of a search's training, the measuring at rungs aside, in three designs."""

    trials: int
    signal: str
    """What is stored; `online` where the search stores nothing, and `stored` is as `online` then."""
    online: float
    """The teacher runs in every trial."""
    stored: float
    """It ran once."""
    halved: float
    """It ran once, and a part of the trials stops at each rung."""

    @property
    def stored_times(self) -> float:
        return self.online / self.stored

    @property
    def halved_times(self) -> float:
        return self.online / self.halved

    def as_json(self) -> dict[str, object]:
        """Plain JSON values."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return found | {"stored_times": self.stored_times, "halved_times": self.halved_times}


def search_saving(
    plan: Plan, trials: int, signal: StoredSignal | None = None, student: Architecture | None = None
) -> SearchSaving:
    """Of a search with so many `trials` that each train a `student`, the costliest of the plan's if None.

    `signal` is what is stored of the teacher, or what the plan chose.
    """
    experiment, family, length = plan.experiment, plan.family, plan.experiment.data.sequence_length
    search = experiment.searched
    kind = signal or choose_signal(experiment, plan.teacher)
    arch = student or costliest(plan)
    tokens = tokens_seen(search.retrain.tokens, search.retrain.batch, length)
    training, teacher = training_flops(family, arch, length), forward_flops(family, plan.teacher, length)
    needed = search.retrain.needs_teacher
    teacher = teacher if needed else 0
    runs = _halved_runs(plan, trials, tokens)
    once, beside = 0, teacher
    if needed and isinstance(kind, StoredSignal):
        once = teacher if kind.sparse else body_flops(family, plan.teacher, length)
        beside = 0 if kind.sparse else head_flops(plan.teacher)
    return SearchSaving(
        trials=trials,
        signal=kind.label,
        online=float(tokens * trials * (training + teacher)),
        stored=float(tokens * (once + trials * (training + beside))),
        halved=tokens * (once + runs * (training + beside)),
    )


def search_savings(plan: Plan) -> tuple[SearchSaving, ...]:
    """Of the plan's own number of trials and of `COMPARED_TRIALS`, by final hidden states and by what the
    plan chose; none without a search."""
    if plan.experiment.search is None:
        return ()
    found: list[SearchSaving] = []
    for trials in sorted({plan.trials, COMPARED_TRIALS}):
        for saving in (exact_saving(plan, trials), search_saving(plan, trials)):
            if saving not in found:
                found.append(saving)
    return tuple(found)


def exact_saving(plan: Plan, trials: int, student: Architecture | None = None) -> SearchSaving:
    """The same where the teacher's final hidden states are stored, from which its head is computed again."""
    return search_saving(plan, trials, FinalHidden(), student)


def _halved_runs(plan: Plan, trials: int, tokens: int) -> float:
    """Trials' worth of training that halving leaves of `trials`."""
    search = plan.experiment.searched
    if search.halving is not None:
        rungs, counts = (
            rung_tokens(plan.experiment),
            trials_at_rungs(plan.experiment, trials, len(plan.feasible) if trials == plan.trials else None),
        )
    else:
        rungs = tuple(round(tokens / USUAL_REDUCTION**k) for k in reversed(range(USUAL_RUNGS)))
        size = cohort_size(trials, USUAL_RUNGS, USUAL_REDUCTION, search.fewest_kept, learns=True)
        rule = Halving(rungs=rungs, reduction=USUAL_REDUCTION, keep=search.fewest_kept)
        counts = reached(rule, [min(size, trials - start) for start in range(0, trials, size)])
    trained = sum(n * (end - start) for n, start, end in zip(counts, (0, *rungs), rungs, strict=False))
    return trained / tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySaving:
    """A teacher trained from scratch and students cut from it, against training all of them from scratch."""

    parameters: tuple[int, ...]
    """Of the models, the teacher first."""
    papers_times: float
    """As the paper counts: the students' own training alone."""
    whole_times: float
    """With everything that the experiments do: scores, teacher passes, searches, distillations."""

    def as_json(self) -> dict[str, object]:
        """Plain JSON values."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return found | {"parameters": list(self.parameters)}


def family_saving(plans: Sequence[Plan]) -> FamilySaving | None:
    """Of experiments of which each cuts what the one before has made; None where they are no such chain,
    or do not distill."""
    if len(plans) < 2 or any(plan.experiment.distill is None for plan in plans):
        return None
    if not all(_follows(one, other) for one, other in itertools.pairwise(plans)):
        return None
    models = [plan.start for plan in plans] + [costliest(plans[-1])]
    families = [plans[0].family, *(plan.family for plan in plans)]
    lengths = [plan.experiment.data.sequence_length for plan in plans]
    each = [
        training_flops(family, arch, length)
        for family, arch, length in zip(families, models, [lengths[0], *lengths], strict=True)
    ]
    tokens = [distilled_tokens(plan.experiment) for plan in plans]
    first = each[0] * SCRATCH_TOKENS * max(tokens)
    scratch = first + sum(SCRATCH_TOKENS * n * flops for n, flops in zip(tokens, each[1:], strict=True))
    students = sum(n * flops for n, flops in zip(tokens, each[1:], strict=True))
    everything = sum(
        cost.flops for number, plan in enumerate(plans) for cost in plan.costs(before=plans[:number])
    )
    return FamilySaving(
        parameters=tuple(family.parameters(arch) for family, arch in zip(families, models, strict=True)),
        papers_times=scratch / (first + students),
        whole_times=scratch / (first + everything),
    )


def costliest(plan: Plan) -> Architecture:
    """Of the feasible shapes the one that takes the most operations a token."""
    return costliest_first(plan.family, plan.start, plan.feasible, plan.experiment.data.sequence_length)[0]


def _follows(before: Plan, after: Plan) -> bool:
    """Whether `after` cuts a shape that `before` may have made."""
    whole = before.start
    return any(row.candidate.architecture(whole) == after.start for row in before.feasible)
