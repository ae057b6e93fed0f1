"""`Demand`: the room that a run wants, told to a cluster that makes nodes for what waits for a place.

Ray's autoscaler goes by what is pending. A placement group that nobody works in is just that; placed, it keeps
its node from being taken away again while others are still to come. All of them end with this process, however
it ends, so that no cluster goes on paying for a run that was killed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from minitron_ray.core.errors import Interrupted
from minitron_ray.execution.head import HeadLost
from minitron_ray.execution.room import room_for
from minitron_ray.execution.settings import ClusterSettings, Resources

if TYPE_CHECKING:
    from minitron_ray.execution.cluster import Cluster

_LOOK_S: Final = 1.0


class Demand:
    """Places for processes, asked for one by one. A context; all are given back when its block ends."""

    def __init__(self) -> None:
        self._asked: list[tuple[Resources, Any]] = []

    def __enter__(self) -> Demand:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HeadLost):
            self.forget()
        self.withdraw()

    def ask(self, each: Resources, count: int) -> None:
        """So many places in all, for processes that reserve `each`."""
        asked = sum(other == each for other, _ in self._asked)
        bundle = {"CPU": each.cpus, **({"GPU": each.gpus} if each.gpus else {})}
        self._asked += [(each, placement_group([bundle])) for _ in range(count - asked)]

    def placed(self, each: Resources) -> int:
        """How many of them there are by now: room that is in use by nobody else."""
        groups = (group for other, group in self._asked if other == each)
        return sum(placement_group_table(group)["state"] == "CREATED" for group in groups)

    def withdraw(self) -> None:
        """Gives all back, placed or not."""
        asked, self._asked = self._asked, []
        for _, group in asked:
            remove_placement_group(group)

    def forget(self) -> None:
        """Of a cluster that is lost."""
        self._asked = []


def await_nodes(cluster: Cluster) -> None:
    """On a cluster that makes nodes when they are asked for: until there is room for what a run needs at least, or
    for as long as it is to wait. What does not fit then is said by what needs it. Raises Interrupted on a stop."""
    settings = cluster.settings
    needed = _least(settings)
    began, told = time.monotonic(), False
    with Demand() as demand:
        while lacking := [(each, count) for each, count in needed if room_for(each) < count]:
            if cluster.stop.requested:
                raise Interrupted("stopped by request")
            if time.monotonic() - began > settings.wait_for_workers:
                return
            each, count = lacking[0]  # one after the other: they are not there at the same time
            demand.ask(each, count)
            if not told:
                wanted = f"{count} x {each.cpus} CPUs and {each.gpus} GPUs"
                cluster.events.emit("note", text=f"waiting for nodes: the cluster is asked for {wanted}")
                told = True
            time.sleep(_LOOK_S)


def _least(settings: ClusterSettings) -> list[tuple[Resources, int]]:
    """Processes that a run has at a time, at least, and what each reserves: of trials where so many are wanted."""
    if not settings.autoscale or settings.worker is None or settings.worker_range is None:
        return []
    needed = {settings.worker: settings.worker_range[0]}
    if settings.trial is not None and (settings.concurrent_trials or settings.trial_workers > 1):
        trials = settings.trial_workers * (settings.concurrent_trials or 1)
        needed[settings.trial] = max(trials, needed.get(settings.trial, 0))
    return list(needed.items())
