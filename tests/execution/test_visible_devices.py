"""Which GPUs a worker's CUDA would find on a node that has two: those it reserved.

The node is a real one of Ray's that is told of two GPUs which are not there; a worker says what its
environment names, from which CUDA takes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.core.events import EventBus
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.train_group import Worker, run_group
from minitron_ray.execution.tune_search import SearchRequest, run_search
from minitron_ray.search.cohorts import Cohorts
from minitron_ray.search.halving import Fate, Halving
from tests.end_to_end.nodes import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NODE = "4,5"
"""The node's GPUs, as numbered on its machine."""
HIDDEN = ""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A node of two CPUs and two GPUs, started as a user would, who sets nothing of Ray's about devices."""
    override = os.environ.pop("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = NODE
    with Nodes() as nodes:
        try:
            nodes.head("--num-gpus=2", cpus=2)
        finally:
            del os.environ["CUDA_VISIBLE_DEVICES"]
            if override is not None:
                os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = override
        yield nodes.address


def cluster(address: str, folder: Path, gpus: int) -> Cluster:
    each = {"cpus": 1, "gpus": gpus}
    settings = ClusterSettings.model_validate(
        {"address": address, "workers": 2, "worker": each, "trial": each}
    )
    return Cluster(settings, folder, EventBus(), StopSignal())


def visible() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def look(part: int, report: Any) -> tuple[str | None, int]:
    return visible(), os.getpid()


def look_in_a_group(job: None, worker: Worker) -> tuple[str | None, str]:
    return visible(), worker.device.type


def look_in_a_trial(candidate_id: str, report: Any, reporter: Any, *, folder: Path) -> None:
    (folder / candidate_id).write_text(str(visible()))
    report({"tokens": 1, "val_loss": 1.0, "final": True})


class Silent:
    def rung(self, candidate_id: str, result: dict[str, Any]) -> None: ...
    def ended(self, candidate_id: str, fate: Fate, reason: str | None) -> None: ...


def seen_in_trials(own: Cluster, folder: Path) -> set[str]:
    folder.mkdir()
    names = ["a", "b", "c"]
    cohorts = Cohorts(
        trials=3,
        size=3,
        rule=Halving(rungs=(1,), reduction=2),
        propose=lambda cohort, told, count: names if cohort == 0 else [],
    )
    run_search(
        own,
        SearchRequest(
            objective=partial(look_in_a_trial, folder=folder),
            cohorts=cohorts,
            cost=lambda name, result: None,
        ),
        Silent(),
    )
    return {(folder / name).read_text() for name in names}


def test_tasks_see_the_gpus_that_they_reserved(address: str, tmp_path: Path) -> None:
    """Whichever came first: no process that had none is used for work that has one, or the other way round."""
    found = []
    for gpus in (0, 1, 0, 1):
        with cluster(address, tmp_path, gpus) as own:
            found.append(own.map(look, range(3)))
    without, having = found[0] + found[2], found[1] + found[3]
    assert {seen for seen, _ in without} == {HIDDEN}
    assert {seen for seen, _ in having} <= {"4", "5"}
    assert not {process for _, process in without} & {process for _, process in having}
    assert len({process for _, process in having}) == len(having), "CUDA keeps the GPU that it found first"


def test_text_is_read_without_a_gpu(address: str, tmp_path: Path) -> None:
    with cluster(address, tmp_path, 1) as own:
        assert {seen for seen, _ in own.spread(look, range(2))} == {HIDDEN}


def test_a_process_that_waits_for_a_group_takes_no_gpu(address: str, tmp_path: Path) -> None:
    with cluster(address, tmp_path, 1) as own:
        assert {seen for seen, _ in own.map_groups(look, range(2))} == {HIDDEN}


@pytest.mark.parametrize(("gpus", "expected"), [(0, {HIDDEN}), (1, {"4", "5"})])
def test_trials_see_the_gpus_that_they_reserved(
    address: str, tmp_path: Path, gpus: int, expected: set[str]
) -> None:
    with cluster(address, tmp_path, gpus) as own:
        assert seen_in_trials(own, tmp_path / "seen") <= expected


def test_a_group_without_gpus_sees_none(address: str, tmp_path: Path) -> None:
    with cluster(address, tmp_path, 0) as own:
        assert run_group(own, look_in_a_group, None) == (HIDDEN, "cpu")
