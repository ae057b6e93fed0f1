"""`FeasibleSearch`: Optuna behind Ray Tune, handing out only feasible shapes, each of them once.

Stock OptunaSearch evaluates whatever is asked, repeats points, and tells Optuna that a trial
stopped by halving is complete. Here an infeasible ask is told as pruned with its constraint, a
repeated one with the value already known, a stopped trial as pruned with its intermediate values.
It relies on private attributes of ray 2.60's OptunaSearch, hence the pin on ray's minor version.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from minitron_ray.execution.stop import StopSignal

_ASKS_BEFORE_CHOOSING = 300
"""After so many asks without a new feasible shape, the next untried one in order is taken."""


class Proposals(Protocol):
    """The space in Optuna's terms."""

    @property
    def feasible(self) -> tuple[str, ...]:
        """Candidate ids in a fixed order."""

    def __call__(self, trial: optuna.Trial, /) -> None:
        """Suggest a value on every axis."""

    def candidate_id(self, parameters: dict[str, Any]) -> str | None:
        """The feasible candidate with these values, or None."""

    def violation(self, parameters: dict[str, Any]) -> float:
        """How far outside the budget, relative; positive where infeasible."""

    def parameters(self, candidate_id: str) -> dict[str, Any]:
        """The values that suggest this candidate."""


class FeasibleSearch(OptunaSearch):
    """Suggests `{"candidate_id": ...}`; ends after `trials` distinct candidates or when all were tried."""

    def __init__(
        self,
        proposals: Proposals,
        sampler: optuna.samplers.BaseSampler,
        study: Path,
        stop: StopSignal,
        trials: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(
            space=proposals,
            metric="val_loss",
            mode="min",
            sampler=sampler,
            study_name="search",
            storage=JournalStorage(JournalFileBackend(str(study))),
        )
        self._proposals, self._stop, self._limit = proposals, stop, trials
        self._values: dict[str, float | None] = {}
        self._queue: list[str] = []
        self._candidate_of: dict[str, str] = {}
        self._adopt_study()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its Tuner for a restore that never comes

    def save(self, checkpoint_path: str) -> None:
        """Tune's snapshot of its searcher: empty, since a search goes on from study and tables."""
        Path(checkpoint_path).touch()

    @property
    def remaining(self) -> int:
        """Trials still to be run."""
        return min(self._limit, len(self._proposals.feasible)) - len(self._values)

    def know(self, candidate_id: str, ended: bool) -> None:
        """A candidate of an earlier attempt: not to be tried again if it ended, to be tried first if not."""
        if ended:
            self._values.setdefault(candidate_id, None)
        else:
            self._values.pop(candidate_id, None)
            self._queue.append(candidate_id)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._stop.requested:
            return self.FINISHED
        if len(self._values) >= min(self._limit, len(self._proposals.feasible)):
            return self.FINISHED
        trial, candidate_id = self._next()
        self._values[candidate_id] = None
        self._candidate_of[trial_id] = candidate_id
        self._ot_trials[trial_id] = trial
        trial.set_user_attr("candidate_id", candidate_id)
        return {"candidate_id": candidate_id}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if math.isfinite(result["val_loss"]):
            self._ot_trials[trial_id].report(result["val_loss"], result["tokens"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        trial, result = self._ot_trials[trial_id], result or {}
        value = result.get("val_loss", math.nan)
        if error or not math.isfinite(value):
            self._ot_study.tell(trial, state=TrialState.FAIL)
        elif result.get("final"):
            self._values[self._candidate_of[trial_id]] = value
            self._ot_study.tell(trial, value)
        else:
            self._ot_study.tell(trial, state=TrialState.PRUNED)

    def _adopt_study(self) -> None:
        """Trials that a killed driver left running are failed; finished ones keep their values."""
        for trial in self._ot_study.get_trials(deepcopy=False):
            candidate_id = trial.user_attrs.get("candidate_id")
            if trial.state == TrialState.RUNNING:
                self._ot_study.tell(trial.number, state=TrialState.FAIL)
            elif trial.state == TrialState.COMPLETE and candidate_id in self._proposals.feasible:
                self._values[candidate_id] = trial.value

    def _next(self) -> tuple[optuna.Trial, str]:
        untried = [c for c in self._proposals.feasible if c not in self._values]
        if not self._queue and len(untried) <= self._limit - len(self._values):
            self._queue.extend(untried)  # no more shapes than trials: try every one
        while self._queue:
            candidate_id = self._queue.pop(0)
            if candidate_id in untried:
                return self._enqueued(candidate_id), candidate_id
        for _ in range(_ASKS_BEFORE_CHOOSING):
            trial = self._ot_study.ask()
            parameters = self._suggest_from_define_by_run_func(self._space, trial)
            violation = self._proposals.violation(parameters)
            trial.set_constraint("budget", violation)
            found = self._proposals.candidate_id(parameters)
            if found is None:
                self._ot_study.tell(trial, state=TrialState.PRUNED)
            elif found not in self._values:
                return trial, found
            elif (value := self._values[found]) is not None:
                self._ot_study.tell(trial, value)
            else:
                self._ot_study.tell(trial, state=TrialState.PRUNED)
        return self._enqueued(untried[0]), untried[0]

    def _enqueued(self, candidate_id: str) -> optuna.Trial:
        self._ot_study.enqueue_trial(self._proposals.parameters(candidate_id))
        trial = self._ot_study.ask()
        self._suggest_from_define_by_run_func(self._space, trial)
        trial.set_constraint("budget", 0.0)
        return trial
