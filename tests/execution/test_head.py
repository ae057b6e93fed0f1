"""A cluster whose head is lost: it is noticed before Ray ends the process, and work goes on with another head."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.core.events import EventBus
from minitron_ray.execution import head
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.head import HeadLost, HeadWatch
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.train_group import run_group
from tests.end_to_end.nodes import Nodes
from tests.execution.counting import Counting, count
from tests.execution.test_train_group import at


def refused_after_an_answer(said: list[str], ours: bool) -> tuple[HeadWatch, tuple[str, int]]:
    """A watch of a place where something listened and no longer does; `ours`: what it is told of one that comes."""
    with socket.create_server(("127.0.0.1", 0)) as first:
        place = first.getsockname()
        watch = HeadWatch(f"127.0.0.1:{place[1]}", said.append, lambda: ours)
        time.sleep(0.1)
        watch.check()  # it is not asked whose it is while it answers
    time.sleep(0.2)
    return watch, place


def await_word(said: list[str]) -> None:
    deadline = time.monotonic() + 30
    while not said and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_head_that_answers_again_in_time_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_LOOK_S", 0.02)
    monkeypatch.setattr(head, "LOST_S", 3.0)
    said: list[str] = []
    watch, place = refused_after_an_answer(said, ours=True)
    with socket.create_server(place):
        time.sleep(0.7)
        watch.check()
    await_word(said)
    with pytest.raises(HeadLost, match=rf"head at 127.0.0.1:{place[1]} does not answer"):
        watch.check()
    assert len(said) == 1 and "what is saved stays" in said[0]


def test_another_head_at_the_same_address_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_LOOK_S", 0.02)
    said: list[str] = []
    watch, place = refused_after_an_answer(said, ours=False)
    with socket.create_server(place):
        await_word(said)
    with pytest.raises(HeadLost):
        watch.check()
    assert len(said) == 1 and "is another one now" in said[0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_group_goes_on_from_what_is_saved_with_another_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOST_S", 4.0)
    notes: list[str] = []
    events = EventBus(lambda event: notes.append(event.fields["text"]) if event.kind == "note" else None)
    job = Counting(folder=tmp_path, steps=45)
    (tmp_path / "run").mkdir()
    with Nodes() as nodes:
        nodes.head(cpus=1)

        def again(processes: list[int]) -> None:
            nodes.lose()
            deadline = time.monotonic() + 60
            while not any("waiting" in note for note in notes) and time.monotonic() < deadline:
                time.sleep(0.1)
            nodes.head(cpus=1)

        at(job, 12, again)
        settings = ClusterSettings.model_validate({"address": nodes.address, "workers": "1..2"})
        with Cluster(settings, tmp_path / "run", events, StopSignal()) as own:
            assert run_group(own, count, job, job.saved) == {"step": 45, "workers": 1}
    steps, processes = ([line[name] for line in job.log()] for name in ("step", "processes"))
    assert sorted(set(steps)) == list(range(1, 46))
    back = next(place for place, process in enumerate(processes) if process != processes[0])
    assert steps[back] % job.every == 1 and -1 <= steps[back - 1] - steps[back] < job.every
    assert len(steps) == back + 45 - steps[back] + 1, "only what was not saved is made again"
    assert "waiting for nodes: room for 0" in notes[-1], notes
    assert sum("has not answered" in note for note in notes) == 1
    # That the group's controller is lost may be heard, before or after.
    assert len(notes) == 2 or (len(notes) == 3 and any("workers were lost" in note for note in notes))


@pytest.mark.ray
@pytest.mark.slow
def test_a_head_that_does_not_come_back_is_waited_for_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one that is gone asked for nodes."""
    monkeypatch.setattr(head, "LOST_S", 4.0)
    job = Counting(folder=tmp_path, steps=1000)
    with Nodes() as nodes:
        nodes.head(cpus=1)
        at(job, 7, lambda processes: nodes.lose())
        given = {"address": nodes.address, "workers": "1..2", "worker": {"cpus": 1}, "wait_for_workers": 3}
        settings = ClusterSettings.model_validate({**given, "autoscale": True})
        (tmp_path / "run").mkdir()
        with (
            Cluster(settings, tmp_path / "run", EventBus(), StopSignal()) as own,
            pytest.raises(EnvironmentFailure, match=r"does not answer; start it again, then run the same"),
        ):
            run_group(own, count, job, job.saved)
    assert job.saved() >= 5


@pytest.mark.ray
@pytest.mark.slow
def test_what_has_no_checkpoint_says_so_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what would be asked to stop, and waited for."""
    monkeypatch.setattr(head, "LOST_S", 4.0)
    with Nodes() as nodes:
        nodes.head(cpus=1)
        settings = ClusterSettings.model_validate({"address": nodes.address, "worker": {"cpus": 1}})
        (tmp_path / "run").mkdir()
        begun = tmp_path / "begun"

        def lose() -> None:
            while not begun.exists():
                time.sleep(0.05)
            nodes.lose()

        threading.Thread(target=lose, daemon=True).start()
        with (
            Cluster(settings, tmp_path / "run", EventBus(), StopSignal()) as own,
            pytest.raises(EnvironmentFailure, match=r"does not answer; start it again, then run the same"),
        ):
            own.map(_begin, [begun], heeds_stop=True)


def _begin(begun: Path, report: object) -> None:
    begun.touch()
    time.sleep(120)
