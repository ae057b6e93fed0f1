"""A group of workers under Ray Train, each running the same function on its rank, until it is done.

Every attempt is a Ray Train run of its own, of a fixed size; between two of them nothing of the group is
left but what the function saved. That is how a lost worker, a lost node, a lost controller and a node that
joined are all the same thing: the next attempt, with as many workers as there is room for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import ray
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import RayTrainError
from torch.distributed import DistError

from minitron_ray.core.errors import EnvironmentFailure, Interrupted, MinitronError
from minitron_ray.execution.cluster import Cluster, GroupSize, root_cause
from minitron_ray.execution.demand import Demand
from minitron_ray.execution.failures import first_line, told
from minitron_ray.execution.group_cleaner import CleanerCallback
from minitron_ray.execution.head import HeadLost
from minitron_ray.execution.termination import TerminableTorch, terminated
from minitron_ray.execution.threads import with_threads
from minitron_ray.execution.watched import watched
from minitron_ray.weights.device import memory_shortage

FAILURES: Final = 5
"""In a row, without anything saved between them, before a group is given up."""
_GROW_AFTER_S = 5.0
"""For so long there must be room for more workers before a group is asked to begin again with them."""
_LOOK_S = 1.0
_RELEASE_S = 10.0
"""For so long what is in use may be that of a group which has just ended."""
_LOSSES: Final = (ray.exceptions.RayError, ray.train.TrainingFailedError, RayTrainError, HeadLost)
"""What is said of a lost worker, node, controller or head, or of a group that could not be placed."""
_RETRIED: Final = (*_LOSSES, RuntimeError, OSError)
"""The same, and how it looks to the other workers in the middle of a collective operation."""


def _silent(kind: str, **fields: Any) -> None:
    """The report of every rank but 0."""


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One process of the group. Only rank 0 reports; the others' `report` does nothing."""

    rank: int
    world: int
    device: torch.device
    report: Callable[..., None]
    stop_requested: Callable[[], bool]
    """Whether to save and return as soon as possible: the user asked, or this process was told to end."""
    stopped_by_user: Callable[[], bool] = _never
    """On rank 0, whether it is the user who asked."""
    regroup_requested: Callable[[], bool] = _never
    """On rank 0, whether to return `Again` at the next checkpoint, since there is room for more workers."""


@dataclass(frozen=True, slots=True)
class Again:
    """Returned by a function that saved what it did and is to be called again, by a group made anew."""

    reason: str


def run_group(
    cluster: Cluster,
    function: Callable[[Any, Worker], Any],
    job: Any,
    saved: Callable[[], int] = lambda: 0,
) -> Any:
    """`function(job, worker)` on every worker; returns what rank 0 returned.

    A lost worker, node or Ray Train controller makes a new group, of the workers that there is room for,
    and the function must go on from what it saved; so does `Again`. `saved` tells how much that is:
    as long as it grows between them there may be any number of failures.

    Raises what a worker raised, where that says more than that another was lost; EnvironmentFailure
    after `FAILURES` in a row with nothing saved, or where there is no room for the least number of
    workers for `wait_for_workers` seconds.
    """
    return _Attempts(cluster, function, job, saved).run()


def run_group_in_trial(
    size: GroupSize, function: Callable[[Any, Worker], Any], job: Any, reporter: Any
) -> Any:
    """The same from within a search trial's process, with a fixed size and a few attempts. It reserves
    nothing itself. A stop reaches the workers through `reporter`. Raises EnvironmentFailure where workers
    were lost in all attempts, or after a stop, and else what a worker raised."""
    for attempt in range(1, FAILURES + 1):
        try:
            trainer = _trainer(_name(), size, function, job, reporter)
            return watched(None, partial(_fit, trainer))
        except _RETRIED as error:
            again = _lost(error, size.workers)
            if again and attempt < FAILURES and not reporter.stop_requested():
                continue
            cause, causes = _cause(error), _causes(error) or [error]
            if again and any(isinstance(one, (*_LOSSES, DistError)) for one in causes):
                times = "" if attempt == 1 else f" {attempt} times"
                raise EnvironmentFailure(
                    f"workers were lost{times}: {first_line(cause)}; see logs/ in the run folder"
                ) from error
            raise cause from error
    raise AssertionError("unreachable")


class _Attempts:
    """One after the other, with what is remembered between them."""

    def __init__(
        self,
        cluster: Cluster,
        function: Callable[[Any, Worker], Any],
        job: Any,
        saved: Callable[[], int],
    ) -> None:
        self._cluster, self._function, self._job, self._saved = cluster, function, job, saved
        self._failures, self._reached, self._last = 0, saved(), ""
        self._demand = Demand()

    def run(self) -> Any:
        with self._demand:
            return self._run()

    def _run(self) -> Any:
        while True:
            workers = self._workers()
            self._demand.withdraw()  # what was kept is for them
            try:
                value = self._attempt(workers)
            except _RETRIED as error:
                if not _lost(error, workers):
                    raise told(_cause(error)) from error
                if isinstance(_cause(error), HeadLost):
                    self._demand.forget()
                self._count(error)
                continue
            if not isinstance(value, Again):
                return value
            self._say(f"{value.reason}; the workers begin again from what is saved")

    def _attempt(self, workers: int) -> Any:
        cluster, name = self._cluster, _name()
        cluster.check_joined()
        _, most = cluster.worker_range()
        size = GroupSize(workers=workers, each=cluster.worker(), storage=cluster.storage.resolve())
        trainer = _trainer(name, size, self._function, self._job, cluster.hub.reporter())
        grow = _Growth(cluster, name, workers, self._demand).look if workers < most else lambda: None
        return watched(cluster, partial(_fit, trainer), look=grow)

    def _count(self, error: BaseException) -> None:
        """Raises EnvironmentFailure when it was one failure too many, Interrupted when the user does not
        want another attempt."""
        cause, now = _cause(error), self._saved()
        self._failures = 1 if now > self._reached else self._failures + 1
        self._reached = now
        last, self._last = self._last, first_line(cause)
        # The same twice is no accident, but for NCCL, which words every loss of a connection alike.
        if self._failures > 1 and last == self._last and not isinstance(cause, (*_LOSSES, DistError)):
            raise told(cause)
        if self._cluster.stop.requested:
            raise Interrupted("stopped by request")
        if self._failures >= FAILURES:
            raise EnvironmentFailure(
                f"the workers were lost {self._failures} times in a row with nothing saved in between; the last "
                f"time: {first_line(cause)}; see logs/ in the run folder, then run it again"
            )
        if isinstance(cause, HeadLost):
            return  # which is said already
        self._say(f"workers were lost ({first_line(cause)}); the others begin again from what is saved")

    def _workers(self) -> int:
        """How many there is room for. Waits where that is less than the least, or where Ray is gone."""
        least, most = self._cluster.worker_range()
        began, told = time.monotonic(), False
        while True:
            room, free = self._room()
            waited = time.monotonic() - began
            released = waited >= _RELEASE_S
            if free >= least and (released or free >= min(room, most)):
                return min(free, most)
            if self._cluster.stop.requested:
                raise Interrupted("stopped by request")
            lacking = room < least or released
            if lacking and waited > self._cluster.settings.wait_for_workers:
                self._cluster.check_room()
                raise EnvironmentFailure(
                    f"there is room for {free} of at least {least} workers; add nodes, or lower `workers` in the "
                    f"cluster file, then run it again: it goes on from what is saved"
                )
            if lacking and not told:
                used = "" if room < least else f", since others use what {room} would take"
                self._say(f"waiting for nodes: room for {free} of at least {least} workers{used}")
                told = True
            time.sleep(_LOOK_S)

    def _room(self) -> tuple[int, int]:
        """How many workers fit on the nodes, and how many beside what is in use."""
        cluster = self._cluster
        if self._failures and not cluster.alive():
            self._demand.forget()
            try:
                cluster.reconnect()
            except EnvironmentFailure:
                return 0, 0
        try:
            room, free = cluster.room(), cluster.free() + self._demand.placed(cluster.worker())
            if cluster.settings.autoscale and free < cluster.worker_range()[0]:
                self._demand.ask(cluster.worker(), cluster.worker_range()[0])
            return room, min(room, free)  # of which one may be known earlier
        except HeadLost:
            if not self._failures:
                raise
            return 0, 0

    def _say(self, text: str) -> None:
        self._cluster.events.emit("note", text=text)


class _Growth:
    """Asks a group to begin again once there has been room for more workers for a while, that nobody else uses. A
    cluster that makes nodes is asked for that room."""

    def __init__(self, cluster: Cluster, name: str, workers: int, demand: Demand) -> None:
        self._cluster, self._name, self._workers, self._demand = cluster, name, workers, demand
        self._since: float | None = None
        self._looked = time.monotonic()
        self._asked = False

    def look(self) -> None:
        now = time.monotonic()
        if self._asked or now - self._looked < _LOOK_S:
            return
        self._looked = now
        try:
            more = self._room()
        except _RETRIED:
            return  # the group itself finds out whether Ray is gone
        if more <= 0:
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since >= _GROW_AFTER_S:
            self._ask()

    def _room(self) -> int:
        """For how many workers more there is room."""
        cluster = self._cluster
        each, free, room = cluster.worker(), cluster.free(), cluster.room()
        free += self._demand.placed(each)
        if cluster.settings.autoscale and free + self._workers <= room:  # the group has its own places by now
            self._demand.ask(each, cluster.worker_range()[1] - self._workers)
        return min(free, room - self._workers)

    def _ask(self) -> None:
        self._asked = True
        try:
            self._cluster.check_joined()
        except EnvironmentFailure as error:
            self._cluster.events.emit("note", text=f"what has joined is not taken in: {error}")
        except _RETRIED:
            self._asked = False  # likewise
        else:
            self._cluster.hub.request_regroup(self._name)


def _fit(trainer: TorchTrainer) -> Any:
    """What rank 0 returned."""
    return trainer.fit().return_value


class _Trainer(TorchTrainer):
    """Without Ray Data, of which no group reads anything: no process that would deal its rows out. And with a cleaner
    that needs no dashboard."""

    def _create_default_callbacks(self) -> list[Any]:
        usual = super()._create_default_callbacks()
        others = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [*(one for one in usual if not isinstance(one, others)), CleanerCallback()]


def _name() -> str:
    """Ray resumes a run of the same name, whatever its configuration: never reuse one."""
    return f"group-{uuid.uuid4().hex[:8]}"


def _trainer(
    name: str, size: GroupSize, function: Callable[[Any, Worker], Any], job: Any, reporter: Any
) -> TorchTrainer:
    each = size.each
    return _Trainer(
        _on_worker,
        train_loop_config={
            "work": ray.cloudpickle.dumps((function, job)),  # the controller need not know what it says
            "reporter": reporter,
            "threads": each.cpus,
            "group": name,
        },
        torch_config=TerminableTorch(backend="nccl" if each.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=size.workers,
            use_gpu=each.gpus > 0,
            resources_per_worker={"CPU": each.cpus, **({"GPU": each.gpus} if each.gpus else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(size.storage / "train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _lost(error: BaseException, workers: int) -> bool:
    """Whether another attempt may do better: a worker was lost, and none says more than that. Where all of
    them raised the same and none is gone, the program is at fault; but NCCL words all losses alike."""
    causes = _causes(error)
    alike = len(causes) == workers and len({first_line(cause) for cause in causes}) == 1
    if alike and not isinstance(causes[0], (*_LOSSES, DistError)):
        return False
    cause = _cause(error)
    return isinstance(cause, _RETRIED) and memory_shortage(cause) is None


def _cause(error: BaseException) -> BaseException:
    """What a worker raised; of several, what says most: our own error, then any that is not about the loss
    of another worker."""
    return min(
        _causes(error) or [error],
        key=lambda cause: (not isinstance(cause, MinitronError), isinstance(cause, _RETRIED)),
    )


def _causes(error: BaseException) -> list[BaseException]:
    """What each worker raised, or Ray of it, by rank; empty where the group itself failed."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [root_cause(failures[rank]) for rank in sorted(failures)]
    return [getattr(cause, "_base_exc", cause) for cause in causes]


def _on_worker(config: dict[str, Any]) -> Any:
    context = ray.train.get_context()
    rank, reporter, group = context.get_world_rank(), config["reporter"], config["group"]
    leads, device = rank == 0, get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what names no device of its own, as NCCL, takes the current one
    worker = Worker(
        rank=rank,
        world=context.get_world_size(),
        device=device,
        report=reporter if leads else _silent,
        stop_requested=lambda: terminated() or (leads and reporter.stop_requested()),
        stopped_by_user=reporter.stop_requested if leads else _never,
        regroup_requested=(lambda: reporter.regroup_requested(group)) if leads else _never,
    )
    function, job = ray.cloudpickle.loads(config["work"])
    return with_threads(config["threads"], function, job, worker)
