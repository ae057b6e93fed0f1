"""Which hardware a plan is timed for: the cluster file's devices, or what a probe of this machine measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron_ray.core.fingerprint import digest
from minitron_ray.core.hardware import Hardware
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.plan import Layout, Plan
from minitron_ray.results.cache import Cache

PROBE_VERSION = 1
"""Counted up where the probe measures something else than before."""
MEASURED = "measured by the probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a probe found."""

    name: str
    count: int
    flops: float
    """Operations a second of one device in training steps of the teacher's layers."""
    memory: int | None
    accelerator: bool

    def hardware(self) -> Hardware:
        return Hardware(**asdict(self), source=MEASURED)


def known_hardware(settings: ClusterSettings, cache: Cache, plan: Plan) -> Hardware | None:
    """The devices of the cluster file; else those of an earlier probe of this machine, where the cluster
    is this machine; else None. Imports no tensor library."""
    if settings.devices is not None:
        return settings.devices.hardware()
    if settings.address is not None or (entry := cache.find("probe", probe_key(plan))) is None:
        return None
    return Probe(**json.loads((entry / "probe.json").read_text())).hardware()


def probed_hardware(
    settings: ClusterSettings, cache: Cache, plan: Plan, measure: Callable[[Plan, int], Probe]
) -> Hardware:
    """The same, except that `measure` is called where nothing is known; its answer is kept."""
    if (known := known_hardware(settings, cache, plan)) is not None:
        return known
    found: list[Probe] = []

    def fill(folder: Path) -> None:
        found.append(measure(plan, settings.micro_batch))
        (folder / "probe.json").write_text(json.dumps(asdict(found[0])))

    entry = cache.ensure("probe", probe_key(plan), {"what": "speed of this machine's devices"}, fill)
    return Probe(**json.loads((entry / "probe.json").read_text())).hardware()


def layout_of(settings: ClusterSettings, hardware: Hardware | None) -> Layout:
    """How a run with these settings is laid out."""
    return Layout.on(
        hardware,
        micro_batch=settings.micro_batch,
        workers=settings.worker_range,
        trial_workers=settings.trial_workers,
        concurrent_trials=settings.concurrent_trials,
        importance=settings.importance,
        recompute=settings.activation_checkpointing,
        teacher=settings.teacher,
        asynchronous=settings.checkpoints.asynchronous,
    )


def cost_rows(settings: ClusterSettings, cache: Cache, plan: Plan) -> list[dict[str, Any]]:
    """The rows of the table `costs`."""
    hardware = known_hardware(settings, cache, plan)
    devices = None if hardware is None else hardware.count
    return [cost.row() | {"devices": devices} for cost in plan.costs(hardware, layout_of(settings, hardware))]


def probe_key(plan: Plan) -> str:
    """Digest of the machine, of what is probed, and of the probe: another teacher has other layers."""
    return digest(
        {
            "version": PROBE_VERSION,
            "machine": _machine(),
            "torch": version("torch"),
            "teacher": asdict(plan.teacher),
            "length": plan.experiment.data.sequence_length,
            "precision": plan.experiment.precision,
        }
    )


def _machine() -> dict[str, Any]:
    """What tells one machine's speed from another's, without asking a driver."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return {
        "kind": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [path.read_text().splitlines()[0] for path in gpus],
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
