"""A cluster that makes nodes when they are asked for: Ray's own autoscaler, its nodes processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import ValidationError

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.core.events import EventBus
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.train_group import run_group
from tests.end_to_end.nodes import Nodes
from tests.execution.counting import Counting, count


@pytest.fixture(scope="module")
def makes_two() -> Iterator[str]:
    """Its address: a head without processors that makes up to two nodes of one."""
    with Nodes() as nodes:
        nodes.head(cpus=0, made=2)
        yield nodes.address


def joined(folder: Path, address: str, notes: list[str], **settings: Any) -> Cluster:
    (folder / "run").mkdir()
    events = EventBus(lambda event: notes.append(event.fields["text"]) if event.kind == "note" else None)
    given = {"address": address, "autoscale": True, "worker": {"cpus": 1}, **settings}
    return Cluster(ClusterSettings.model_validate(given), folder / "run", events, StopSignal())


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_come_for_the_least_and_then_for_the_most(makes_two: str, tmp_path: Path) -> None:
    """None is there; the group begins with the first, and again at a checkpoint when the second has come."""
    notes: list[str] = []
    job = Counting(folder=tmp_path, steps=5, least=2)
    with joined(tmp_path, makes_two, notes, workers="1..2") as own:
        found = run_group(own, count, job, job.saved)
        groups = ray.util.placement_group_table().values()
        assert {group["state"] for group in groups} == {"REMOVED"}
    lines = job.log()
    assert found == {"step": len(lines), "workers": 2}
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    workers = [line["workers"] for line in lines]
    assert workers == sorted(workers) and set(workers) == {1, 2}
    assert len(notes) == 2 and "asked for 1 x 1 CPUs and 0 GPUs" in notes[0] and "left at step" in notes[1]


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_that_never_come_are_waited_for_so_long(makes_two: str, tmp_path: Path) -> None:
    notes: list[str] = []
    with (
        joined(tmp_path, makes_two, notes, workers=2, worker={"cpus": 2}, wait_for_workers=3) as own,
        pytest.raises(EnvironmentFailure, match="no node has the 2 CPUs and 0 GPUs that `worker` asks for"),
    ):
        own.connect()
    assert notes == ["waiting for nodes: the cluster is asked for 2 x 2 CPUs and 0 GPUs"]


@pytest.mark.parametrize("given", [{}, {"workers": 2}, {"worker": {"cpus": 1}}])
def test_without_what_is_needed_nothing_can_be_asked_for(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"give workers \(2, or 1\.\.8\) and worker"):
        ClusterSettings.model_validate({"autoscale": True, **given})
