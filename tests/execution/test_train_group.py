"""A group of workers that goes on whatever is lost, on real nodes; each on loopback, with one CPU."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.core.events import EventBus
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.train_group import run_group
from tests.execution.counting import Counting, count

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def cluster(folder: Path, notes: list[str], **settings: Any) -> Cluster:
    (folder / "run").mkdir()
    events = EventBus(lambda event: notes.append(event.fields["text"]) if event.kind == "note" else None)
    given = ClusterSettings.model_validate({"worker": {"cpus": 1}, **settings})
    return Cluster(given, folder / "run", events, StopSignal())


def at(job: Counting, step: int, do: Callable[[list[int]], None]) -> threading.Thread:
    """Does it to the processes of the group that makes this step, as soon as it has."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            lines = job.log()
            if lines and lines[-1]["step"] >= step:
                return do(lines[-1]["processes"])
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_lost_and_terminated_workers_cost_at_most_what_was_not_saved(tmp_path: Path) -> None:
    notes: list[str] = []
    job = Counting(folder=tmp_path, steps=45)
    at(job, 7, lambda processes: os.kill(processes[0], signal.SIGKILL))
    at(job, 21, lambda processes: os.kill(processes[1], signal.SIGTERM))
    with cluster(tmp_path, notes, workers="1..2") as own:
        assert run_group(own, count, job, job.saved) == {"step": 45, "workers": 2}
    steps = [line["step"] for line in job.log()]
    assert sorted(set(steps)) == list(range(1, 46))
    assert 0 < len(steps) - 45 <= job.every, "the kill repeats what was not saved; the SIGTERM nothing"
    assert len(notes) == 2 and "workers were lost" in notes[0] and "left at step 2" in notes[1]


@ray.remote(num_cpus=1)
def occupy(folder: Path) -> None:
    """Another's work: it holds its processor until it may go."""
    (folder / "occupied").touch()
    while not (folder / "released").exists():
        time.sleep(0.1)


def test_a_group_takes_what_others_leave_and_grows_when_they_go(tmp_path: Path) -> None:
    """Nothing is lost by it: the group begins again at a checkpoint, and each step is made once."""
    notes: list[str] = []
    job = Counting(folder=tmp_path, steps=150)
    with cluster(tmp_path, notes, workers="1..2") as own:
        own.connect()
        other = occupy.remote(tmp_path)
        while not (tmp_path / "occupied").exists():
            time.sleep(0.1)
        at(job, 5, lambda processes: (tmp_path / "released").touch())
        assert run_group(own, count, job, job.saved) == {"step": 150, "workers": 2}
        ray.get(other)
    lines = job.log()
    assert [line["step"] for line in lines] == list(range(1, 151))
    workers = [line["workers"] for line in lines]
    assert workers == sorted(workers) and set(workers) == {1, 2}
    assert workers.count(1) % job.every == 0 and len(notes) == 1 and "left at step" in notes[0]


def test_what_every_worker_raises_ends_the_group(tmp_path: Path) -> None:
    """At once where Ray heard of it from all of them; where it heard of one first, after the second time."""
    job = Counting(folder=tmp_path, steps=5, fails=True)
    with (
        cluster(tmp_path, [], workers=2) as own,
        pytest.raises(RuntimeError, match="sizes 3 and 4 do not match"),
    ):
        run_group(own, count, job, job.saved)
    assert [line["step"] for line in job.log()] in ([1], [1, 1])


def test_no_room_for_the_least_number_is_said_at_once(tmp_path: Path) -> None:
    with (
        cluster(tmp_path, [], workers="64..99", wait_for_workers=0) as own,
        pytest.raises(EnvironmentFailure, match=r"64 workers of 1 CPUs and 0 GPUs do not fit"),
    ):
        run_group(own, count, Counting(folder=tmp_path, steps=1))


def test_a_cluster_that_is_gone_is_not_asked_about_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `ray start` that was killed leaves its address behind, where Ray Train's clean-up looks for one."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # Ray's sockets lie in it, whose paths are limited
        monkeypatch.setenv("RAY_TMPDIR", short)
        left = Path(short) / "ray" / "ray_current_cluster"
        left.parent.mkdir()
        left.write_text("127.0.0.1:1")
        with cluster(tmp_path, [], workers=1) as own:
            job = Counting(folder=tmp_path, steps=2)
            assert run_group(own, count, job, job.saved) == {"step": 2, "workers": 1}
    said = "".join(path.read_text() for path in tmp_path.glob("run/logs/ray/train/*"))
    assert "Registered placement group" in said
    assert "Failed to stop PlacementGroupCleaner" not in said
    assert "RAY_ADDRESS" not in os.environ


def test_a_lost_controller_keeps_no_place(tmp_path: Path) -> None:
    """Nothing but the group's controller knows of its places, which are all that there are."""
    notes: list[str] = []
    job = Counting(folder=tmp_path, steps=25)

    def kill_controller(processes: list[int]) -> None:
        raylet = psutil.Process(processes[0]).parent()
        assert raylet is not None
        [controller] = [one for one in raylet.children() if "TrainController" in " ".join(one.cmdline())]
        controller.kill()

    at(job, 7, kill_controller)
    with cluster(tmp_path, notes, workers=2, wait_for_workers=60) as own:
        assert own.cpus == 2
        assert run_group(own, count, job, job.saved) == {"step": 25, "workers": 2}
    steps = [line["step"] for line in job.log()]
    assert sorted(set(steps)) == list(range(1, 26)) and len(steps) - 25 <= job.every
    assert len(notes) == 1 and "workers were lost" in notes[0], notes
