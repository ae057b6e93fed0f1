"""A group of workers under Ray Train, each running the same function on its rank."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from minitron_ray.core.errors import MinitronError
from minitron_ray.execution.cluster import Cluster, GroupSize, root_cause
from minitron_ray.execution.threads import with_threads

_RESTARTS = 2
_START_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One process of the group. Only rank 0 reports; the others' `report` does nothing."""

    rank: int
    world: int
    device: torch.device
    report: Callable[..., None]
    stop_requested: Callable[[], bool]


def run_group(cluster: Cluster, function: Callable[[Any, Worker], Any], job: Any) -> Any:
    """`function(job, worker)` on every worker; returns what rank 0 returned.

    A lost worker restarts the group, and the function must go on from what it saved. Raises what a
    worker raised.
    """
    size = GroupSize(workers=cluster.workers(), each=cluster.worker(), storage=cluster.storage.resolve())
    return _fit(_trainer(size, function, job, cluster.hub.reporter()), cluster)


def run_group_in_trial(
    size: GroupSize, function: Callable[[Any, Worker], Any], job: Any, reporter: Any
) -> Any:
    """The same from within a search trial's process, which reserves nothing itself. A stop reaches the
    workers through `reporter`."""
    return _fit(_trainer(size, function, job, reporter), None)


def _trainer(
    size: GroupSize, function: Callable[[Any, Worker], Any], job: Any, reporter: Any
) -> TorchTrainer:
    each = size.each
    return TorchTrainer(
        _on_worker,
        train_loop_config={"function": function, "job": job, "reporter": reporter, "threads": each.cpus},
        torch_config=TorchConfig(backend="nccl" if each.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=size.workers,
            use_gpu=each.gpus > 0,
            resources_per_worker={"CPU": each.cpus, **({"GPU": each.gpus} if each.gpus else {})},
        ),
        run_config=RunConfig(
            # Ray resumes a run of the same name, whatever its configuration: never reuse one.
            name=f"group-{uuid.uuid4().hex[:8]}",
            storage_path=str(size.storage / "train"),
            failure_config=FailureConfig(max_failures=_RESTARTS, controller_failure_limit=_START_ATTEMPTS),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _fit(trainer: TorchTrainer, cluster: Cluster | None) -> Any:
    """`fit` in a thread: on the main thread it would replace the SIGINT handler for good."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["value"] = trainer.fit().return_value
        except BaseException as error:  # handed to the main thread below
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="train", daemon=True)
    thread.start()
    asked = False
    while thread.is_alive():
        thread.join(timeout=0.2)
        if cluster is not None and cluster.stop.requested and not asked:
            cluster.hub.request_stop()
            asked = True
    if "error" in outcome:
        raise _cause(outcome["error"])
    return outcome["value"]


def _cause(error: BaseException) -> BaseException:
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = root_cause(failures[min(failures)])
        error = getattr(error, "_base_exc", error)
    if isinstance(error, ray.exceptions.RayError):
        return MinitronError(f"the worker group was lost: {str(error).splitlines()[0]}")
    return error


def _on_worker(config: dict[str, Any]) -> Any:
    context = ray.train.get_context()
    rank, reporter = context.get_world_rank(), config["reporter"]
    leads = rank == 0
    worker = Worker(
        rank=rank,
        world=context.get_world_size(),
        device=get_device(),
        report=reporter if leads else _silent,
        stop_requested=reporter.stop_requested if leads else _never,
    )
    return with_threads(config["threads"], config["function"], config["job"], worker)


def _silent(kind: str, **fields: Any) -> None:
    """The report of every rank but 0."""


def _never() -> bool:
    return False
