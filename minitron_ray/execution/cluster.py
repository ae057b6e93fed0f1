"""`Cluster`: ways of calling a function on Ray: once, on many parts, for many trials, by a group of workers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from minitron_ray.core.errors import EnvironmentFailure, Interrupted, NoRoom
from minitron_ray.core.events import EventBus
from minitron_ray.execution.head import HeadLost, HeadWatch
from minitron_ray.execution.nodes import check_nodes
from minitron_ray.execution.ray_start import cluster_address, keep_logs, link_logs, start_ray
from minitron_ray.execution.room import alive, fit, free, knows_us, nodes, room_for, smallest
from minitron_ray.execution.settings import ClusterSettings, Resources
from minitron_ray.execution.stop import StopSignal

if TYPE_CHECKING:
    from minitron_ray.execution.train_group import Worker

HEAD: Final = "node:__internal_head__"
"""What only the node has where Ray was started: a little of it keeps a process there."""
_RETRIES = 2
"""Of a task whose worker is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSize:
    """A group of processes, and what each of them reserves. Picklable."""

    workers: int
    each: Resources
    storage: Path
    """Where Ray Train keeps its own state; every node must see it."""


class Cluster:
    """A context: Ray is started (or joined) at the first call, and left when the block ends."""

    def __init__(
        self,
        settings: ClusterSettings,
        folder: Path,
        events: EventBus,
        stop: StopSignal,
        shared: Sequence[Path] = (),
    ) -> None:
        """`folder` is the run's: Ray's own state goes to `ray/` in it, its output to `logs/`. `shared` is what
        every node must see: results first, then models; it is `folder` alone unless given."""
        self.settings = settings
        self.events = events
        self.stop = stop
        self.folder = folder
        self.shared = tuple(shared) or (folder,)
        self._hub: Any = None
        self._head: HeadWatch | None = None
        self._session: Path | None = None
        self._range: tuple[int, int] | None = None
        self._each: Resources | None = None
        self._checked_nodes: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hub is None:
            return
        import ray

        if self._head is not None:
            self._head.close()
        self._hub.close()
        ray.shutdown()
        shutil.rmtree(self.storage, ignore_errors=True)  # nothing of Ray's own state is read again
        if self._session is not None:
            keep_logs(self._session, self.folder / "logs")

    @property
    def storage(self) -> Path:
        """Where Ray keeps its own state; every node must see it."""
        if self.settings.storage is None:
            return self.folder / "ray"
        return Path(self.settings.storage).expanduser() / self.folder.name

    @property
    def hub(self) -> Any:
        """The mailbox between workers and this process; connects on first use."""
        self.connect()
        return self._hub

    def connect(self) -> None:
        """Starts Ray or joins it, unless that is done.

        Raises EnvironmentFailure where it does not answer, or does not have what was asked for.
        """
        if self._hub is not None:
            return
        from minitron_ray.execution.hub import Hub

        address = cluster_address(self.settings)
        info = start_ray(address)
        if address is None:  # another cluster's logs are not ours to copy
            self._session = Path(str(info["session_dir"]))
            link_logs(self._session, self.folder / "logs")
        self._hub = Hub(self.events.emit)
        if address is not None:
            self._head = HeadWatch(
                str(info["gcs_address"]), lambda text: self.events.emit("note", text=text), knows_us
            )
        self.workers(), self.trial_group()  # what does not fit is said before anything is computed
        if address is not None:
            self.check_joined()

    @property
    def gpus(self) -> int:
        return int(self._total("GPU"))

    @property
    def cpus(self) -> int:
        return int(self._total("CPU"))

    def worker(self) -> Resources:
        """What each worker reserves: found once, so that it stays when nodes come and go."""
        if self._each is None:
            self._each = self._checked("worker", self.settings.worker or self._whole())
        return self._each

    def mapper(self) -> Resources:
        """What each process of `map` reserves: as a worker does, if the cluster file says anything of workers, and
        else a fair part, as those that share nothing are faster side by side."""
        return self.worker() if self.settled else self._checked("worker", self._fair())

    def mappers(self) -> int:
        """How many of them there are at a time."""
        return self.workers() if self.settled else room_for(self.mapper())

    @property
    def settled(self) -> bool:
        """Whether the cluster file says anything of workers."""
        return self.settings.workers is not None or self.settings.worker is not None

    def trial(self) -> Resources:
        return self._checked("trial", self.settings.trial or self._fair())

    def _whole(self) -> Resources:
        """A GPU each where there are any; else the CPUs of a node, of the smallest, or of more workers that are asked
        for an equal part. Two that share a node are slower than one, as they exchange weights and gradients, and
        hold the weights of both models twice."""
        if self.gpus:
            return Resources(gpus=1)
        least, _ = self.settings.worker_range or (1, 1)
        fitting = (cpus for cpus in range(smallest(), 0, -1) if room_for(Resources(cpus=cpus)) >= least)
        return Resources(cpus=next(fitting, 1))

    def _fair(self) -> Resources:
        """A GPU each where there are any; else the CPUs of a node, the smallest, or half of those of the only one."""
        if self.gpus:
            return Resources(gpus=1)
        alone = sum(node.get("CPU", 0) >= 1 for node in nodes()) == 1
        return Resources(cpus=max(1, smallest() // 2 if alone else smallest()))

    def workers(self) -> int:
        """How many processes distill, as of now: of a range as many as there is room for. A cluster that makes nodes
        is asked for those that are missing, and waited for."""
        from minitron_ray.execution.demand import await_nodes

        self.connect()
        await_nodes(self)
        self.check_room()
        return min(self.worker_range()[1], self.room())

    def check_room(self) -> None:
        """Raises NoRoom where there is none for the least number of workers."""
        (least, _), each = self.worker_range(), self.worker()
        if least > self.room():
            raise NoRoom(
                f"{least} workers of {each.cpus} CPUs and {each.gpus} GPUs do not fit a cluster of {self.cpus} "
                f"CPUs and {self.gpus} GPUs; start the nodes that are missing, or lower `workers` in the cluster file"
            )

    def worker_range(self) -> tuple[int, int]:
        """The least and the most processes that distill together; the cluster's choice is made once."""
        if self._range is None:
            chosen = self.gpus or sum(fit(node, self.worker()) > 0 for node in nodes())
            self._range = self.settings.worker_range or (chosen, chosen)
        return self._range

    def room(self) -> int:
        """How many workers fit on the nodes that there are now, were nothing else on them."""
        return room_for(self.worker())

    def free(self) -> int:
        """The same beside what is in use at this moment, of this run or of others."""
        return free(self.worker())

    def together(self) -> int:
        """The most processes of `map` that may share one node's memory."""
        return min(self.mappers(), max(fit(node, self.mapper()) for node in nodes()))

    def reconnect(self) -> None:
        """After the cluster's head was lost: joins the one that answers at the same address, or starts Ray
        here again. Raises EnvironmentFailure where nothing answers."""
        self._abandon()
        try:
            self.connect()
        except EnvironmentFailure:
            self._abandon()  # so that the next try looks at everything anew
            raise

    def check_head(self) -> None:
        """Raises HeadLost where the head of a cluster that was joined is gone."""
        if self._head is not None:
            self._head.check()

    def _abandon(self) -> None:
        import ray

        if self._head is not None:
            self._head.close()
            self._head = None
        if self._hub is not None:
            self._hub.abandon()
            self._hub = None
        ray.shutdown()

    def alive(self) -> bool:
        """Whether Ray still answers."""
        return self._hub is not None and self._hub.answers()

    def check_joined(self) -> None:
        """Looks at all nodes where some have not been looked at. Raises EnvironmentFailure as `check_nodes`."""
        joined = set(alive())
        if not joined <= self._checked_nodes:
            check_nodes(self.shared)
            self._checked_nodes |= joined

    def trial_group(self) -> GroupSize | None:
        """What a search trial of several processes is made of; None where it is one.

        Raises EnvironmentFailure where not even one such trial fits.
        """
        workers, each = self.settings.trial_workers, self.trial()
        if workers == 1:
            return None
        if workers > room_for(each):
            raise NoRoom(
                f"a search trial of {workers} workers with {each.cpus} CPUs and {each.gpus} GPUs each does not fit "
                f"a cluster of {self.cpus} CPUs and {self.gpus} GPUs; lower `trial_workers` in the cluster file"
            )
        return GroupSize(workers=workers, each=each, storage=self.storage.resolve())

    def teacher_group(self) -> GroupSize | None:
        """The processes that share a teacher that nobody is trained beside: as many as those of a trial, or of
        the distillation where the cluster file has `teacher: sharded`; None where each holds it whole.

        Raises EnvironmentFailure where they do not fit.
        """
        if self.settings.teacher == "whole":
            return None
        if self.settings.teacher == "sharded" and (workers := self.workers()) > self.settings.trial_workers:
            return GroupSize(workers=workers, each=self.worker(), storage=self.storage.resolve())
        return self.trial_group()

    def groups(self, size: GroupSize) -> int:
        """How many groups of that size `map_groups` has at a time."""
        return max(1, min(self.concurrent_trials(), room_for(size.each) // size.workers))

    def trial_places(self) -> int:
        """Processes of search trials that fit at a time."""
        return max(1, room_for(self.trial()))

    def trials_on_a_node(self) -> int:
        """Of them those that share a node, at most."""
        return max(1, *(fit(node, self.trial()) for node in nodes()))

    def concurrent_trials(self) -> int:
        """Trials of `trial_workers` processes at a time: never more than have all of their processes at once, or
        they would wait for one another for ever."""
        room = room_for(self.trial()) // self.settings.trial_workers
        return max(1, min(self.settings.concurrent_trials or room, room))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments, report)` on the largest node, with all of its CPUs and a GPU if it has one.

        Raises what the function raised; Interrupted when the user asked to stop meanwhile.
        """
        hub = self.hub
        node = max(nodes(), key=lambda resources: (resources.get("GPU", 0) > 0, resources.get("CPU", 0)))
        all_of_it = Resources(cpus=int(node.get("CPU", 1)), gpus=min(1, int(node.get("GPU", 0))))
        [result] = self._run(function, [(*arguments, hub.reporter())], all_of_it, at_once=1)
        return result

    def as_trial(self, function: Callable[..., Any]) -> Any:
        """`function(report)` with what a process of a search trial reserves. Raises as `call`."""
        [result] = self._run(function, [(self.hub.reporter(),)], self.trial(), at_once=1)
        return result

    def map(
        self, function: Callable[..., Any], parts: Sequence[Any], *arguments: Any, heeds_stop: bool = False
    ) -> list[Any]:
        """`function(part, *arguments, report)` for every part, results in the order of `parts`; as many at
        a time as there are mappers, each with what a mapper reserves.

        A part whose worker is lost is done again by another. Progress that the parts report is added up.
        Raises what the first to fail raised, and Interrupted on a stop; no other part goes on then. With
        `heeds_stop` those in work are not killed but asked to stop, by `report`, and waited for.
        """
        calls = self._calls(parts, arguments)
        return self._run(function, calls, self.mapper(), at_once=self.mappers(), heeds_stop=heeds_stop)

    @property
    def one_thread(self) -> bool:
        """What is spread has one processor each."""
        return True

    def spread(self, function: Callable[..., Any], parts: Sequence[Any], *arguments: Any) -> list[Any]:
        """The same with one CPU each and no device, `settings.tokenizers` at a time: for text."""
        return self._run(
            function,
            self._calls(parts, arguments),
            Resources(),
            at_once=self.settings.tokenizers or self.cpus,
        )

    def map_groups(
        self, function: Callable[..., Any], parts: Sequence[Any], *arguments: Any, heeds_stop: bool = False
    ) -> list[Any]:
        """The same for a function that has each part done by a `trial_group` and waits for it: it reserves
        nothing itself. As many parts at a time as there can be trials."""
        calls = self._calls(parts, arguments)
        return self._run(function, calls, None, at_once=self.concurrent_trials(), heeds_stop=heeds_stop)

    def _calls(self, parts: Sequence[Any], arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """The arguments of each part's call; progress that the parts report is added up."""
        reporters = self.hub.part_reporters(len(parts))
        return [(part, *arguments, report) for part, report in zip(parts, reporters, strict=True)]

    def _run(
        self,
        function: Callable[..., Any],
        calls: list[tuple[Any, ...]],
        each: Resources | None,
        at_once: int,
        heeds_stop: bool = False,
    ) -> list[Any]:
        """The results of the calls, each a task that reserves `each`, or nothing and stays where the run
        is; none goes on when one fails."""
        import ray

        from minitron_ray.execution.failures import told
        from minitron_ray.execution.threads import with_threads

        threads = 1 if each is None else each.cpus
        reserved: dict[str, Any] = {"num_cpus": 0, "resources": {HEAD: 0.001}}
        if each is not None:
            reserved = {"num_cpus": each.cpus, "num_gpus": each.gpus}
        remote = ray.remote(max_retries=_RETRIES, **reserved)(with_threads)
        results: list[Any] = [None] * len(calls)
        waiting = list(enumerate(calls))[::-1]
        running: dict[Any, int] = {}
        try:
            with self._leaving_none(running, heeds_stop):
                while waiting or running:
                    while waiting and len(running) < at_once:
                        number, arguments = waiting.pop()
                        running[remote.remote(threads, function, *arguments)] = number
                    for task in ray.wait(list(running), timeout=0.5)[0]:
                        number = running.pop(task)
                        results[number] = ray.get(task)
                    self.check_head()
                    if (waiting or running) and self.stop.requested:
                        raise Interrupted("stopped by request")
        except ray.exceptions.RayTaskError as error:
            raise told(root_cause(error), training=False) from error
        except ray.exceptions.RayError as error:
            raise EnvironmentFailure(
                f"a worker was lost: {str(error).splitlines()[0]}; see logs/ in the run folder, then run the same "
                "command again"
            ) from error
        return results

    @contextmanager
    def _leaving_none(self, running: Mapping[Any, int], heeds_stop: bool) -> Iterator[None]:
        """However its block ends, none of the tasks goes on. Those that heed a stop come to a safe point before,
        unless it is Ctrl-C once more."""
        import ray

        try:
            yield
        except Exception as error:
            if heeds_stop and running and not isinstance(error, HeadLost):
                self.hub.request_stop()
                while ray.wait(list(running), num_returns=len(running), timeout=0.5)[1]:
                    pass
            raise
        finally:
            _end(list(running))

    def _total(self, resource: str) -> float:
        self.connect()
        return sum(node.get(resource, 0) for node in nodes())

    def _checked(self, what: str, resources: Resources) -> Resources:
        self.connect()
        if not room_for(resources):
            raise NoRoom(
                f"no node has the {resources.cpus} CPUs and {resources.gpus} GPUs that `{what}` asks for "
                f"(cluster: {self.cpus} CPUs, {self.gpus} GPUs); lower them in the cluster file"
            )
        return resources


def in_group(job: Any, size: GroupSize, function: Callable[[Any, Worker], Any], report: Any) -> Any:
    """For `map_groups`: `function(job, worker)` on every rank of a group; what rank 0 returned."""
    from minitron_ray.execution.train_group import run_group_in_trial  # with it comes Ray Train

    return run_group_in_trial(size, function, job, report)


def _end(tasks: list[Any]) -> None:
    """Ends tasks, but for those that have ended: a task that is cancelled while Ray takes in its result makes
    Ray abort this process ("Tried to complete task that was not pending")."""
    import ray

    if tasks:
        for task in ray.wait(tasks, num_returns=len(tasks), timeout=0)[1]:
            ray.cancel(task, force=True)


def root_cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, taken out of Ray's wrappings."""
    cause = getattr(error, "cause", None)
    return root_cause(cause) if isinstance(cause, BaseException) else error
