"""The search: Ray Tune runs trials, Optuna proposes, successive halving stops the losers.

Tune's own snapshots are not used to resume. The tables hold every rung that was reported; a new
Tuner is started from them (`known`): finished candidates are not proposed again, their losses stand
in the halving's rungs and in the study, and candidates that were cut off are tried first.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from minitron_ray.core.errors import MinitronError
from minitron_ray.execution.cluster import Cluster, root_cause
from minitron_ray.execution.optuna_search import FeasibleSearch, Proposals
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.threads import with_threads

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownTrial:
    """What the tables say of a candidate: (tokens, loss) at its rungs, and whether it had ended."""

    candidate_id: str
    rungs: tuple[tuple[int, float], ...]
    ended: bool


class TrialRecord(Protocol):
    """Hears of every trial, in the driver."""

    def started(self, candidate_id: str) -> None: ...
    def rung(self, candidate_id: str, result: dict[str, Any]) -> None: ...
    def ended(self, candidate_id: str, status: str, reason: str | None) -> None:
        """`status` is completed, stopped (by halving), failed or interrupted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """`objective(candidate_id, report_rung, reporter)` runs in the trial's process.

    It calls `report_rung(result)` at every rung with the keys `tokens`, `val_loss` and `final`.
    """

    objective: Callable[..., None]
    proposals: Proposals
    sampler: BaseSampler
    study: Path
    trials: int
    rungs: tuple[int, ...]
    """Tokens at which a trial reports, ascending; the last one ends it."""
    reduction: float | None
    known: tuple[KnownTrial, ...]


def run_search(cluster: Cluster, request: SearchRequest, record: TrialRecord) -> None:
    """Runs trials until `request.trials` have ended (those known included), or the user asks to stop."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    reporter = cluster.hub.reporter()
    each = cluster.trial()
    trainable = tune.with_resources(
        tune.with_parameters(_trial, objective=request.objective, reporter=reporter, threads=each.cpus),
        {"CPU": each.cpus, "GPU": each.gpus},
    )
    search = FeasibleSearch(request.proposals, request.sampler, request.study, cluster.stop, request.trials)
    for trial in request.known:
        search.know(trial.candidate_id, ended=trial.ended)
    remaining = search.remaining
    if remaining <= 0:
        return
    storage = cluster.storage / "tune"
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=_scheduler(request),
            num_samples=remaining,
            max_concurrent_trials=cluster.concurrent_trials(),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"search-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage.resolve()),
            verbose=0,
            callbacks=[_Listener(record, cluster.stop)],
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    watcher = _StopWatcher(cluster)
    try:
        tuner.fit()
    except ray.exceptions.RayError as error:
        raise MinitronError(f"the search was lost: {str(error).splitlines()[0]}") from error
    finally:
        watcher.close()


class _StopWatcher:
    """Passes the user's wish to stop on to the trials while `fit` holds the main thread."""

    def __init__(self, cluster: Cluster) -> None:
        import threading

        self._closing = threading.Event()
        self._cluster = cluster
        self._thread = threading.Thread(target=self._watch, name="stop-watcher", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._closing.wait(0.2):
            if self._cluster.stop.requested:
                self._cluster.hub.request_stop()
                return

    def close(self) -> None:
        self._closing.set()
        self._thread.join()


def _trial(config: dict[str, Any], objective: Callable[..., None], reporter: Any, threads: int) -> None:
    with_threads(threads, objective, config["candidate_id"], tune.report, reporter)


def _scheduler(request: SearchRequest) -> TrialScheduler:
    """Asynchronous successive halving over tokens, knowing the rungs of earlier attempts."""
    if request.reduction is None or len(request.rungs) == 1:
        return FIFOScheduler()
    scheduler = AsyncHyperBandScheduler(
        time_attr="tokens",
        metric="val_loss",
        mode="min",
        grace_period=request.rungs[0],
        max_t=request.rungs[-1],
        reduction_factor=request.reduction,
    )
    bracket = scheduler._brackets[0]
    # Ray spaces its rungs geometrically; ours are whole optimizer steps.
    bracket._rungs = [(tokens, {}) for tokens in reversed(request.rungs)]
    for trial in request.known:
        for tokens, loss in trial.rungs if trial.ended else ():
            bracket.on_result(SimpleNamespace(trial_id=trial.candidate_id), tokens, -loss)
    return scheduler


class _Listener(tune.Callback):
    """Tells the record what Tune does. Tune pickles its callbacks; this one has nothing to restore."""

    def __init__(self, record: TrialRecord, stop: StopSignal) -> None:
        self._record, self._stop = record, stop

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record.started(trial.config["candidate_id"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._record.rung(trial.config["candidate_id"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        if last.get("final"):
            status = "completed"
        elif self._stop.requested:
            status = "interrupted"
        else:
            status = "stopped"
        self._record.ended(trial.config["candidate_id"], status, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error()
        cause = root_cause(error) if error is not None else None
        reason = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
        self._record.ended(trial.config["candidate_id"], "failed", reason)
