"""Stage `search`: try candidates inside the budget, and keep those with the least loss after retraining."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from minitron_ray.execution.tune_search import SearchRequest, run_search
from minitron_ray.plan import Plan
from minitron_ray.plan.tokens import halving_rule, trials_a_cohort
from minitron_ray.results.files import cannot_write
from minitron_ray.results.store import Store
from minitron_ray.search.choice import intervals
from minitron_ray.search.cohorts import FINISHED, Cohorts, Known
from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.search.propose import Told, propose, sampler_for
from minitron_ray.search.sampler import SearchSampler
from minitron_ray.search.study import write_study
from minitron_ray.stages.choice import choose, search_rows, sequence_losses
from minitron_ray.stages.context import Context
from minitron_ray.stages.hardware import known_hardware, layout_of
from minitron_ray.stages.importance import read_scores
from minitron_ray.stages.objectives import Cost, first_costs
from minitron_ray.stages.reuse import reopen
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.trial import Objective
from minitron_ray.stages.trial_record import Record
from minitron_ray.stages.zero_shot import read_zero_shot
from minitron_ray.weights.device import local_device

_SHOW_S: Final = 10.0
"""Between two writes of the study while trials run: one of many trials takes a while."""


def run(context: Context, plan: Plan, setting: Setting, signal: str | None) -> tuple[dict[str, Any], str]:
    """Writes `trials`, `sequence_losses` and `study.journal`; returns the chosen candidates, best first.

    What is tried, what is stopped and what wins follows from the experiment: an attempt goes on from
    the tables and checkpoints of those before it.
    """
    search, store = context.experiment.searched, context.run.store
    checkpoints = (context.run.folder / "trials").resolve()
    sampler = sampler_for(search.sampler, len(plan.feasible), search.trials)
    cost, group = Cost(plan), context.cluster.trial_group()
    alone = frozenset[str]() if group is None else _alone(context, plan)
    objective = Objective(
        setting=setting,
        scores=read_scores(context),
        candidates={row.candidate.id: row.candidate for row in plan.feasible},
        signal=Path(signal) if signal else None,
        checkpoints=checkpoints,
        latency=cost.name == "latency",
        group=group,
        alone=alone,
    )
    proposer = _Proposer(context, plan, sampler)
    cohorts = _cohorts(plan, store, proposer, cost)
    record = Record(
        context,
        plan,
        cohorts,
        checkpoints,
        keep_stopped=search.keep == "ties",
        show=lambda: proposer.show_study(cohorts.told()),
    )
    request = SearchRequest(
        objective=objective,
        cohorts=cohorts,
        cost=cost,
        group=group,
        alone=alone,
        shape=lambda candidate_id: plan.candidate(candidate_id).shape_text(),
    )
    run_search(context.cluster, request, record)
    proposer.write_study(cohorts.told())
    context.check_stop()
    shutil.rmtree(checkpoints, ignore_errors=True)
    return choose(plan, store, cost)


def _alone(context: Context, plan: Plan) -> frozenset[str]:
    """The candidates that one device holds, of a search whose trials are groups else. A GPU that nothing is known
    of is asked for its memory; processors share that of their machine. None in a rehearsal: its small models would
    all fit, and the groups of the real ones be proven by nobody."""
    if context.run.rehearsal:
        return frozenset()
    cluster = context.cluster
    hardware = known_hardware(cluster.settings, context.cache, plan)
    layout = layout_of(cluster.settings, hardware)
    if not cluster.trial().gpus and layout.memory is not None:
        layout = replace(layout, memory=layout.memory // cluster.trials_on_a_node())
    elif layout.memory is None and cluster.trial().gpus:
        layout = replace(layout, accelerator=True, memory=cluster.as_trial(_memory_of_a_gpu))
    alone = plan.alone(layout)
    if alone:
        text = (
            f"of {len(plan.feasible)} shapes one device holds {len(alone)}: each of them trains in one process, the "
            f"others in groups of {cluster.settings.trial_workers}"
        )
        if len(alone) < len(plan.feasible) and plan.experiment.precision == "bfloat16":
            # A group's weights are rounded for a pass, those of one process for its products only.
            text += "; in bfloat16 losses of the two kinds differ by rounding, about 0.001"
        context.events.emit("note", text=text)
    return alone


def _memory_of_a_gpu(report: Callable[..., None]) -> int:
    """On a worker: bytes of the GPU that it has."""
    return int(torch.cuda.get_device_properties(local_device()).total_memory)


def _cohorts(plan: Plan, store: Store, proposer: _Proposer, cost: Cost) -> Cohorts:
    search = plan.experiment.searched

    def begin(known: Mapping[str, Known]) -> Cohorts:
        return Cohorts(
            trials=plan.trials,
            size=trials_a_cohort(plan.experiment, plan.trials, len(plan.feasible)),
            rule=halving_rule(plan.experiment),
            propose=proposer,
            ties=Ties(store, plan.experiment.seed) if search.keep == "ties" else None,
            costed=cost.name is not None,
            known=known,
        )

    return taken_up(store, cost, begin)


def taken_up(
    store: Store,
    cost: Callable[[str, Mapping[str, Any]], float | None],
    begin: Callable[[Mapping[str, Known]], Cohorts],
) -> Cohorts:
    """The cohorts as earlier attempts left them; `begin` makes them from what is known of each trial.

    Failed trials stay failed, as they do without an interruption. Only where all have ended and none was
    completed are they tried again: then what made them fail may have gone.
    """
    cohorts = begin(known_trials(store, cost))
    states = {fate.state for fate in cohorts.fates.values()}
    if "failed" in states and "completed" not in states and cohorts.next(()) is FINISHED:
        reopen(store)
        return begin(known_trials(store, cost))
    return cohorts


def known_trials(store: Store, cost: Callable[[str, Mapping[str, Any]], float | None]) -> dict[str, Known]:
    """What earlier attempts of this search left in the table `trials`."""
    rows = search_rows(store)
    costs, known = first_costs(rows, cost), dict[str, Known]()
    for row in rows:
        trial = known.setdefault(row["candidate_id"], Known(cohort=row["cohort"]))
        if row["val_loss"] is not None:
            trial.losses[row["tokens"]] = row["val_loss"]
            trial.cost = costs.get(row["candidate_id"])
        trial.failed |= row["status"] == "failed"
    return known


class _Proposer:
    """Asks the sampler for a cohort, and shows the study so far in `study.journal`."""

    def __init__(self, context: Context, plan: Plan, sampler: SearchSampler) -> None:
        self.sampler = sampler
        self._asked = context.experiment.searched.sampler  # its objectives hold, whoever takes the shapes
        self._seed = context.experiment.seed
        space = context.experiment.searched.space
        self._proposals = ShapeProposals.of(plan.rows, space, plan.start.hidden)
        self._zero_shot = read_zero_shot(context.run.store)
        self._journal = context.run.folder / "study.journal"
        self._shapes = {row.candidate.id: row.candidate.shape_text() for row in plan.feasible}
        self._shown = -math.inf

    def __call__(self, cohort: int, told: Sequence[Told], count: int) -> list[str]:
        if told:
            self.write_study(told)
        return propose(self._proposals, self.sampler, self._seed, cohort, told, self._zero_shot, count)

    def show_study(self, told: Sequence[Told]) -> None:
        """Writes the study for those who look on, not more often than anyone would notice."""
        if time.monotonic() - self._shown >= _SHOW_S:
            self.write_study(told)

    def write_study(self, told: Sequence[Told]) -> None:
        """Raises EnvironmentFailure where it can't be written."""
        self._shown = time.monotonic()
        shapes = {trial.candidate_id: {"shape": self._shapes[trial.candidate_id]} for trial in told}
        try:
            write_study(self._journal, self._proposals, self._asked, told, self._zero_shot, shapes)
        except OSError as error:
            raise cannot_write(self._journal, error) from error


class Ties:
    """The stopped trials whose validation sequences do not tell them from the winner, where they stopped."""

    def __init__(self, store: Store, seed: int) -> None:
        self._store, self._seed = store, seed

    def __call__(self, winner: str, stopped: Mapping[str, int]) -> list[str]:
        losses = sequence_losses(self._store)
        differences = {
            name: losses[name, "search", tokens] - losses[winner, "search", tokens]
            for name, tokens in stopped.items()
        }
        found = intervals(np.stack(list(differences.values()), axis=1), seed=self._seed)
        # One that was even ahead of the winner there has not been told from it either.
        return [name for name, interval in zip(differences, found, strict=True) if interval.low <= 0]
