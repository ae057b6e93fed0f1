"""`ClusterSettings`: what a file of `cluster/` may say. None of it enters a fingerprint."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

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
    """Processes of the distillation; null: one a GPU, else two, or one on a single CPU."""
    worker: Resources | None = None
    """What each of them reserves; null: one GPU where there are any, else half of the CPUs."""
    trial: Resources | None = None
    """What each search trial reserves; null: likewise. A trial trains on one device."""
    concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    """Search trials at the same time; null: as many as fit."""
    micro_batch: Annotated[int, Field(ge=1)] = 4
    """Sequences a forward pass; the optimizer's batch is made of as many passes as it needs."""
    storage: str | None = None
    """Folder that every node sees, for Ray's own state; null: inside the run folder."""
    importance: Literal["auto", "resident", "streamed"] = "auto"
    """How a teacher is scored: `resident` has its weights in each worker's memory, `streamed` those of
    one layer at a time. `auto` streams where the weights would take more than 60 % of what is free."""

    @model_validator(mode="after")
    def _a_trial_is_one_process(self) -> Self:
        if self.trial is not None and self.trial.gpus > 1:
            raise ValueError(
                f"trial.gpus is {self.trial.gpus}, but a trial trains on one device; set it to 1"
            )
        return self
