"""`ClusterSettings`: what a file of `cluster/` may say. None of it enters a fingerprint."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from minitron_ray.core.bounds import ByteCount
from minitron_ray.core.hardware import KINDS, UTILIZATION, Hardware, rate_text
from minitron_ray.core.kinds import Section
from minitron_ray.core.units import Count


class Resources(Section):
    """What one process reserves."""

    cpus: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[int, Field(ge=0)] = 0


class Devices(Section):
    """What the run's processes compute on, for `plan`: how fast, how much memory, how many."""

    kind: str | None = None
    """A device whose peak and memory are known: a100, h100, h200 or b200."""
    flops: Count | None = None
    """Operations a second at its peak, in the type of the products; null: those of `kind` in bfloat16."""
    memory: ByteCount | None = None
    """Bytes of one device; null: those of `kind`."""
    count: Annotated[int, Field(ge=1)] = 1
    utilization: Annotated[float, Field(gt=0, le=1)] = UTILIZATION
    """Share of the peak that training reaches."""

    @field_validator("kind")
    @classmethod
    def _one_that_is_known(cls, kind: str | None) -> str | None:
        if kind is not None and kind not in KINDS:
            raise ValueError(
                f"{kind!r} is not known here; known are {', '.join(KINDS)}; for another one leave kind out "
                f"and give flops and memory"
            )
        return kind

    @model_validator(mode="after")
    def _a_speed(self) -> Self:
        if self.kind is None and self.flops is None:
            raise ValueError(f"give a kind ({', '.join(KINDS)}) or flops")
        return self

    def hardware(self) -> Hardware:
        """The same as a plan needs it."""
        known = None if self.kind is None else KINDS[self.kind]
        peak = float(self.flops or (known.flops if known else 0))
        return Hardware(
            name=self.kind or "device",
            count=self.count,
            flops=peak * self.utilization,
            memory=self.memory or (known.memory if known else None),
            source=f"{self.utilization:.0%} of {rate_text(peak)}",
        )


class ClusterSettings(Section):
    """Which Ray cluster, and how much of it each part of a run takes. Null means: as the cluster allows."""

    address: str | None = None
    """`host:port` of a running cluster; null starts Ray on this machine."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes of the distillation; null: one a GPU, else two, or one on a single CPU."""
    worker: Resources | None = None
    """What each of them reserves; null: one GPU where there are any, else half of the CPUs."""
    trial: Resources | None = None
    """What each process of a search trial reserves; null: likewise. A process has one device."""
    trial_workers: Annotated[int, Field(ge=1)] = 1
    """Processes of a search trial. More than one share its student (FSDP2), for candidates that one
    device does not hold."""
    concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    """Search trials at the same time; null: as many as fit."""
    micro_batch: Annotated[int, Field(ge=1)] = 4
    """Sequences a forward pass; the optimizer's batch is made of as many passes as it needs."""
    devices: Devices | None = None
    """What `plan` counts device-hours for; null: what `plan --probe` once measured on this machine."""
    storage: str | None = None
    """Folder that every node sees, for Ray's own state; null: inside the run folder."""
    importance: Literal["auto", "resident", "streamed"] = "auto"
    """How a teacher is scored: `resident` has its weights in each worker's memory, `streamed` those of
    one layer at a time. `auto` streams where the weights would take more than 60 % of what is free."""

    @model_validator(mode="after")
    def _a_process_has_one_device(self) -> Self:
        if self.trial is not None and self.trial.gpus > 1:
            raise ValueError(
                f"trial.gpus is {self.trial.gpus}, but a process trains on one device; set it to 1, and "
                f"trial_workers to as many devices as a trial needs"
            )
        return self
