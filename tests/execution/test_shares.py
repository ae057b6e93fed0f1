"""How many processes there are, and what each reserves, where the cluster file leaves it open."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_ray.core.events import EventBus
from minitron_ray.execution import cluster as module
from minitron_ray.execution import room
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings, Resources
from minitron_ray.execution.stop import StopSignal

LAPTOP = [{"CPU": 8.0}]
TWO = [{"CPU": 8.0}, {"CPU": 4.0}, {"CPU": 0.0}]
GPUS = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}]


def cluster(
    nodes: list[dict[str, float]], settings: ClusterSettings, folder: Path, patch: pytest.MonkeyPatch
) -> Cluster:
    """Of Ray it knows its nodes alone."""
    for where in (module, room):
        patch.setattr(where, "nodes", lambda: nodes)
    made = Cluster(settings, folder, EventBus(), StopSignal())
    made._hub = object()  # connected
    return made


@pytest.mark.parametrize(
    ("nodes", "settings", "workers", "mappers"),
    [
        (LAPTOP, {}, (1, 8, 0), (2, 4, 0)),
        (LAPTOP, {"workers": 2}, (2, 4, 0), (2, 4, 0)),
        (LAPTOP, {"workers": 3}, (3, 2, 0), (3, 2, 0)),
        (LAPTOP, {"workers": "1..8"}, (1, 8, 0), (1, 8, 0)),
        (LAPTOP, {"worker": {"cpus": 3}}, (1, 3, 0), (1, 3, 0)),
        (TWO, {}, (2, 4, 0), (3, 4, 0)),
        (TWO, {"workers": 3}, (3, 4, 0), (3, 4, 0)),
        (TWO, {"workers": 12}, (12, 1, 0), (12, 1, 0)),
        (TWO, {"workers": "1..2", "worker": {"cpus": 1}}, (2, 1, 0), (2, 1, 0)),
        (GPUS, {}, (6, 1, 1), (6, 1, 1)),
        (GPUS, {"workers": 2}, (2, 1, 1), (2, 1, 1)),
    ],
)
def test_what_is_left_open_follows_from_the_nodes(
    nodes: list[dict[str, float]],
    settings: dict[str, object],
    workers: tuple[int, int, int],
    mappers: tuple[int, int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As (processes, CPUs, GPUs)."""
    made = cluster(nodes, ClusterSettings.model_validate(settings), tmp_path, monkeypatch)
    for (count, cpus, gpus), found, each in (
        (workers, made.workers(), made.worker()),
        (mappers, made.mappers(), made.mapper()),
    ):
        assert (found, each) == (count, Resources(cpus=cpus, gpus=gpus))
