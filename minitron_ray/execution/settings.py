"""`ClusterSettings`: what a file of `cluster/` may say. None of it changes a result's fingerprint."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from minitron_ray.core.kinds import Section


class Resources(Section):
    """What one process reserves."""

    cpus: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[int, Field(ge=0)] = 0


class ClusterSettings(Section):
    """Which Ray cluster, and how much of it each part of a run takes. Null means: as the cluster allows."""

    address: str | None = None
    """`host:port` of a running cluster; null starts Ray on this machine."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes of the distillation; null: one a GPU, else one a CPU, at most two."""
    worker: Resources | None = None
    """What each of them reserves; null: one GPU where there are any, else one CPU."""
    trial: Resources | None = None
    """What each search trial reserves; null: likewise."""
    concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    """Search trials at the same time; null: as many as fit."""
    micro_batch: Annotated[int, Field(ge=1)] = 4
    """Sequences a forward pass; the optimizer's batch is made of as many passes as it needs."""
    storage: str | None = None
    """Folder that every node sees, for Ray's own state; null: inside the run folder."""
