"""`ClusterSettings`: what a file of `cluster/` may say. None of it enters a fingerprint."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from minitron_ray.core.bounds import ByteCount
from minitron_ray.core.hardware import KINDS, UTILIZATION, Hardware, rate_text
from minitron_ray.core.kinds import Section
from minitron_ray.core.units import Count
from minitron_ray.distillation.engine import Engine

_RANGE: Final = re.compile(r"(\d{1,6})\s*\.\.\s*(\d{1,6})")


def _workers(value: Any) -> int | str:
    """A number from 1, or `least..most` in its shortest form; a range of one number is that number."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    match = _RANGE.fullmatch(str(value).strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise PydanticCustomError(
            "workers", "expected a number of workers from 1 (2), or the least and the most of them (1..8)"
        )
    least, most = int(match[1]), int(match[2])
    return least if least == most else f"{least}..{most}"


Workers = Annotated[int | str, BeforeValidator(_workers, json_schema_input_type=int | str)]
"""`2`, or `1..8`: as many as there is room for between the two, from moment to moment."""


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

    @property
    def peak(self) -> float:
        """Operations a second of one device."""
        return float(self.flops or (KINDS[self.kind].flops if self.kind else 0))

    def hardware(self) -> Hardware:
        """The same as a plan needs it."""
        known, peak = None if self.kind is None else KINDS[self.kind], self.peak
        return Hardware(
            name=self.kind or "device",
            count=self.count,
            flops=peak * self.utilization,
            memory=self.memory or (known.memory if known else None),
            source=f"{self.utilization:.0%} of {rate_text(peak)}",
        )


class CheckpointSettings(Section):
    """How the checkpoints of a distillation are kept. When they are made is the experiment's
    (`distill.checkpoint_every`)."""

    keep: Annotated[int, Field(ge=1)] = 2
    """The newest so many."""
    asynchronous: bool = True
    """Written by a thread from a copy in the CPU's memory while training goes on; false: training waits."""


class ClusterSettings(Section):
    """Which Ray cluster, and how much of it each part of a run takes. Null means: as the cluster allows."""

    address: str | None = None
    """`host:port` of a running cluster; null starts Ray on this machine."""
    jobs: str | None = None
    """`http://host:port` of the cluster's job server, for `submit` and `watch`; null: port 8265 of this
    machine, where a tunnel to the cluster's head ends."""
    python: Annotated[str, Field(min_length=1)] = "python"
    """The interpreter on the head node that has minitron-ray, for `submit`."""
    workers: Workers | None = None
    """Processes of the distillation; null: one a GPU, else one a node. A range (`1..8`) goes on with fewer when
    a node is lost, and takes new ones in at a checkpoint."""
    wait_for_workers: Annotated[float, Field(ge=0)] = 600.0
    """Seconds that a distillation waits where there is room for less than the least number of workers, and any run
    for nodes that it asked for (`autoscale`)."""
    autoscale: bool = False
    """Whether the cluster makes nodes for what waits for a place, as those of Ray's launcher and of KubeRay do: a
    run asks for the room of `workers`, and of `concurrent_trials`, and waits for the least of it."""
    checkpoints: CheckpointSettings = CheckpointSettings()
    """Of the distillation."""
    worker: Resources | None = None
    """What each of them reserves; null: one GPU where there are any, else the CPUs of a node."""
    trial: Resources | None = None
    """What each process of a search trial reserves, one device at most; null: likewise, but half of the CPUs of the
    only node."""
    trial_workers: Annotated[int, Field(ge=1)] = 1
    """Processes of a search trial. More than one share its student (FSDP2), for candidates that one
    device does not hold, and one trains those that it holds where its memory is known (`devices`, or a GPU's own).
    They share so what other stages run forward, see `teacher`."""
    concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    """Search trials at the same time; null: as many as fit."""
    tokenizers: Annotated[int, Field(ge=1)] | None = None
    """Tasks of one CPU that tokenise more than 64 MiB of text; null: one a CPU. 1: no tasks, and no Ray for
    it; the process of the command does it."""
    micro_batch: Annotated[int, Field(ge=1)] = 4
    """Sequences a forward pass; the optimizer's batch is made of as many passes as it needs."""
    activation_checkpointing: bool = False
    """Whether students in training keep of each layer its input alone and run it forward again for the
    backward pass: memory for a third more time."""
    compile: bool = False
    """Whether the layers of a student that is distilled go through torch.compile; trials are too short."""
    teacher: Literal["auto", "whole", "sharded"] = "auto"
    """Whether each worker of a group holds the whole running teacher, or a shard of it. `auto` shards one
    that would take more than 10 % of the memory that is free on the fullest device. Where nobody is trained
    beside it groups are those of a trial, and under `sharded` of the distillation's size if that is more."""
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

    @model_validator(mode="after")
    def _what_to_ask_for(self) -> Self:
        if self.autoscale and (self.workers is None or self.worker is None):
            raise ValueError(
                "autoscale: true asks the cluster for nodes by what a run needs; give workers (2, or 1..8) and "
                "worker: {cpus, gpus}"
            )
        if self.autoscale and self.trial_workers > 1 and self.trial is None:
            raise ValueError(
                "autoscale: true asks the cluster for nodes by what a run needs; give trial: {cpus, gpus}"
            )
        return self

    @property
    def engine(self) -> Engine:
        """What of it the training loop needs."""
        return Engine(
            recompute=self.activation_checkpointing,
            compiled=self.compile,
            teacher=self.teacher,
            peak=None if self.devices is None else self.devices.peak,
        )

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """The least and the most workers; None where the cluster decides."""
        if self.workers is None:
            return None
        least, _, most = str(self.workers).partition("..")
        return int(least), int(most or least)
