"""Ray Train's cleaner of a group's places, without the dashboard.

The cleaner is an actor that outlives the group's controller, and gives the places back where the controller was lost
before it could. Ray's asks the dashboard whether the controller lives, and finds one through the environment, or
through what `ray start` last left on the machine. This one asks the cluster that it is on.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._private import state
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.execution.controller import placement_group_cleaner


class Cleaner(placement_group_cleaner.PlacementGroupCleaner):
    """An actor: what is replaced is replaced in its own process."""

    def start_monitoring(self) -> bool:
        placement_group_cleaner.is_actor_alive = _is_alive
        return bool(super().start_monitoring())


class CleanerCallback(placement_group_callback.PlacementGroupCleanerCallback):
    """In the controller, which is an actor of its own likewise."""

    def after_controller_start(self, train_run_context: Any) -> None:
        placement_group_callback.PlacementGroupCleaner = Cleaner
        super().after_controller_start(train_run_context)


def _is_alive(actor_id: str, timeout: float) -> bool:
    try:
        known = state.actors(actor_id)
    except (ray.exceptions.RayError, RuntimeError, ValueError):
        return True  # not known at the moment
    return bool(known) and known["State"] != "DEAD"
