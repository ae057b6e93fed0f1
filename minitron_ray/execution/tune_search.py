"""The search on Ray Tune: trials in cohorts, halved synchronously, each in a process that is used again.

What to run and where to stop is decided by `search.cohorts`; here are a Tune searcher that hands out
what it says, and a scheduler that ends a trial where it says so. A trial that must wait at a rung for
others of its cohort ends for Tune, too, which frees its place: it comes up again as another trial of
the same candidate, and goes on from its checkpoint. The same way leads on after a kill. Tune's own
snapshots are not used: all that is known is in the tables.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.execution.cluster import HEAD, Cluster, GroupSize, root_cause
from minitron_ray.execution.failures import first_line, left_off, of_the_machine
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.threads import with_threads
from minitron_ray.execution.watched import watched
from minitron_ray.search.cohorts import FINISHED, Cohorts
from minitron_ray.search.halving import Fate

_RESTARTS: Final = 2
"""Of a trial whose process is lost."""


class TrialRecord(Protocol):
    """Hears of every trial, in the driver."""

    def rung(self, candidate_id: str, result: dict[str, Any]) -> None:
        """At every report, also of a rung that was reported before."""

    def ended(self, candidate_id: str, fate: Fate, reason: str | None) -> None:
        """Once it is decided, which may be while another trial runs; `reason` is that of a failed one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """`objective(candidate_id, report_rung, reporter)` runs in the trial's process.

    It calls `report_rung(result)` at every rung with the keys `tokens`, `val_loss` and `final`; called
    again for a candidate it first reports the rungs that it passed.
    """

    objective: Callable[..., None]
    cohorts: Cohorts
    cost: Callable[[str, dict[str, Any]], float | None]
    """The second figure of a candidate with this result; None in a search for one."""
    group: GroupSize | None = None
    """The processes that the objective starts for a trial; None where the trial's own is all."""
    alone: frozenset[str] = frozenset()
    """Candidates whose trial is its own process even so."""
    shape: Callable[[str], str] = str
    """A candidate's name for people."""

    def processes(self, candidate_id: str) -> int:
        """That train the candidate together."""
        return 1 if self.group is None or candidate_id in self.alone else self.group.workers


def run_search(cluster: Cluster, request: SearchRequest, record: TrialRecord) -> None:
    """Runs trials until all have ended, or the user asks to stop.

    Raises EnvironmentFailure when a trial can't go on for a reason that is the machine's and not its own: it
    has not failed then, and no other is begun; those in work stop as the user's wish makes them. Likewise
    what the record or the proposer raised.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    progress = _Progress(request, record)
    progress.settle()
    places = _Places(request.processes, cluster.trial_places())
    search = CohortSearcher(progress, cluster.stop, places)
    if search.over():
        return
    each = cluster.trial()

    def reserved(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        if request.processes(config["candidate_id"]) == 1:
            return tune.PlacementGroupFactory([{"CPU": each.cpus, "GPU": each.gpus}])
        # It only waits for those that train: it takes no place, and stays where the run is.
        return tune.PlacementGroupFactory([{"CPU": 0, HEAD: 0.001}])

    trainable = tune.with_resources(
        tune.with_parameters(
            _trial, objective=request.objective, reporter=cluster.hub.reporter(), threads=each.cpus
        ),
        reserved,
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=RungScheduler(progress),
            num_samples=-1,  # the searcher says when it is over
            max_concurrent_trials=min(cluster.settings.concurrent_trials or places.all, places.all),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"search-{uuid.uuid4().hex[:8]}",
            storage_path=str((cluster.storage / "tune").resolve()),
            verbose=0,
            callbacks=[_Listener(progress)],
            failure_config=tune.FailureConfig(max_failures=_RESTARTS),
        ),
    )
    try:
        watched(cluster, tuner.fit, ends=lambda: progress.ends)
    except (ray.exceptions.RayError, OSError) as error:
        raise progress.error or left_off("the search was lost", first_line(error)) from error
    except BaseException:
        progress.abandon()
        raise
    if progress.error is not None:
        raise progress.error
    if progress.broken is not None and not cluster.stop.requested:
        candidate_id, reason = progress.broken
        raise left_off(request.shape(candidate_id), reason)


def _trial(config: dict[str, Any], objective: Callable[..., None], reporter: Any, threads: int) -> None:
    """In the trial's process. What the objective raises would come again: it is reported, and not tried anew."""
    try:
        with_threads(threads, objective, config["candidate_id"], tune.report, reporter)
    except Exception as error:
        logging.getLogger(__name__).exception("trial %s failed", config["candidate_id"])
        if of_the_machine(error):
            tune.report({"broken": first_line(error)})
            return
        told = str(error).strip().splitlines()
        tune.report({"failed": told[-1] if told else type(error).__name__})


class _Progress:
    """Cohorts and record, kept in step."""

    def __init__(self, request: SearchRequest, record: TrialRecord) -> None:
        self.cohorts = request.cohorts
        self._cost, self._record = request.cost, record
        self._told: dict[str, Fate] = {}
        self._reasons: dict[str, str] = {}
        self.broken: tuple[str, str] | None = None
        """The first candidate whose trial can't go on on this machine, and why; it stays a running one."""
        self.error: Exception | None = None
        """What was raised first of what Tune calls: Tune itself would make a text of it, with a traceback."""

    @property
    def ends(self) -> bool:
        """Whether the search is to end as it is."""
        return self.broken is not None or self.error is not None

    def abandon(self) -> None:
        """Nobody waits for the search any more: it ends where it is, and nothing more is recorded."""
        self.error = self.error or EnvironmentFailure("the search was left")

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keeps what its block raises, by which the search ends."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def halts(self, candidate_id: str, result: dict[str, Any]) -> bool:
        """Whether a trial ends with this result, which is not recorded yet."""
        if self.error is not None:
            return True
        with self.guarded():
            fate = self._decide(candidate_id, result)
            return fate.state in ("waiting", "stopped") and result.get("tokens", 0) >= fate.tokens
        return True

    def _decide(self, candidate_id: str, result: dict[str, Any]) -> Fate:
        if "failed" in result:
            self.fail(candidate_id, result["failed"])
        if "broken" in result:
            self.breaks(candidate_id, result["broken"])
        if "tokens" not in result:  # ended before its first report
            return self.cohorts.fates[candidate_id]
        cost = self._cost(candidate_id, result)
        return self.cohorts.report(candidate_id, result["tokens"], result["val_loss"], cost)

    def breaks(self, candidate_id: str, reason: str) -> None:
        """The machine's fault: nothing is said of the candidate."""
        if self.broken is None or self.broken[0] == candidate_id:
            self.broken = candidate_id, reason

    def fail(self, candidate_id: str, reason: str) -> None:
        self._reasons[candidate_id] = reason
        self.cohorts.fail(candidate_id)

    def recorded(self, candidate_id: str, result: dict[str, Any]) -> None:
        if "tokens" in result:
            self._record.rung(candidate_id, result)
        self.settle()

    def settle(self) -> None:
        """Tells the record of all that has been decided since."""
        for candidate_id, fate in self.cohorts.fates.items():
            before = self._told.get(candidate_id)
            if fate.ended and fate != before:
                self._record.ended(candidate_id, fate, self._reasons.get(candidate_id))
            self._told[candidate_id] = fate


class _NotPickled:
    """Tune pickles what it is given for a restore that never comes."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class _Places:
    """Never more trials than have all of their processes at once: groups would wait for one another for ever."""

    processes: Callable[[str], int]
    """Of a candidate."""
    all: int

    def has_room(self, candidate_id: str, live: Iterable[str]) -> bool:
        taken = sum(map(self.processes, live))
        return not taken or taken + self.processes(candidate_id) <= self.all


class CohortSearcher(_NotPickled, Searcher):
    """Hands out `{"candidate_id": ...}` as the cohorts say; ends with them, on the user's wish to stop, when the
    machine breaks a trial off, or when something can't be written."""

    def __init__(self, progress: _Progress, stop: StopSignal, places: _Places) -> None:
        super().__init__()
        self._progress, self._stop, self._places = progress, stop, places
        self._live: dict[str, str] = {}

    def over(self) -> bool:
        """Whether nothing is left to run."""
        return self._progress.cohorts.next(()) is FINISHED

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        found: str | object | None = FINISHED
        if not self._stop.requested and not self._progress.ends:
            with self._progress.guarded():
                found = self._progress.cohorts.next(tuple(self._live.values()))
                self._progress.settle()
        if found is FINISHED or self._progress.ends:
            return str(self.FINISHED)
        if not isinstance(found, str) or not self._places.has_room(found, self._live.values()):
            return None
        self._live[trial_id] = found
        return {"candidate_id": found}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """After an error the listener hears next what it was."""
        self._live.pop(trial_id, None)

    def save(self, checkpoint_path: str) -> None:
        """Tune's snapshot of its searcher: empty."""
        Path(checkpoint_path).touch()


class RungScheduler(_NotPickled, FIFOScheduler):
    """Ends a trial that has to wait at this rung, or does not go on past it."""

    def __init__(self, progress: _Progress) -> None:
        super().__init__()
        self._progress = progress

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        halts = self._progress.halts(trial.config["candidate_id"], result)
        return str(self.STOP if halts else self.CONTINUE)


class _Listener(_NotPickled, tune.Callback):
    """Hears what Tune does, after searcher and scheduler have."""

    def __init__(self, progress: _Progress) -> None:
        self._progress = progress

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._progress.error is not None:
            return  # rows are not to follow one that is missing
        with self._progress.guarded():
            self._progress.recorded(trial.config["candidate_id"], result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._progress.error is not None:
            return  # likewise
        candidate_id, error = trial.config["candidate_id"], trial.get_pickled_error() or trial.get_error()
        cause = root_cause(error) if error is not None else None
        with self._progress.guarded():
            if cause is None or of_the_machine(cause):
                why = "" if cause is None else f": {first_line(cause)}"
                self._progress.breaks(candidate_id, f"its process was lost{why}; see logs/ in the run folder")
            else:
                told = str(cause).strip().splitlines()
                self._progress.fail(candidate_id, told[-1] if told else type(cause).__name__)
            self._progress.settle()
