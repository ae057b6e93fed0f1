"""`Cluster.map` on real Ray: order, shares, lost workers, failures, stops."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from minitron_ray.core.errors import EnvironmentFailure, Interrupted, MinitronError
from minitron_ray.core.events import Event, EventBus
from minitron_ray.data import reading, tokens
from minitron_ray.data.sources.files import Files
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings, Resources
from minitron_ray.execution.stop import StopSignal
from minitron_ray.results.cache import Cache

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = ClusterSettings(workers=2, worker=Resources(cpus=1))
    with Cluster(settings, tmp_path_factory.mktemp("run"), EventBus(), StopSignal()) as cluster:
        yield cluster


def full(part: int, folder: Path, report: Any) -> None:
    """The first finds the disk full once both have begun; the other ends when it is asked to stop."""
    (folder / f"{part}").touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 or (part and not report.stop_requested()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if part == 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    (folder / "saved").touch()


def test_who_heeds_a_stop_comes_to_a_safe_point_before_an_error_is_told(tmp_path: Path) -> None:
    """First of all, with a cluster of its own: one that has asked its workers to stop goes on asking."""
    folder, settings = tmp_path / "parts", ClusterSettings(workers=2, worker=Resources(cpus=1))
    folder.mkdir()
    with (
        Cluster(settings, tmp_path / "run", EventBus(), StopSignal()) as cluster,
        pytest.raises(
            EnvironmentFailure, match=r"a worker can't go on: .*No space left on device; mend that"
        ),
    ):
        cluster.map(full, [0, 1], folder, heeds_stop=True)
    assert (folder / "saved").exists()


def square(part: int, power: int, report: Any) -> tuple[int, int, int]:
    import torch

    time.sleep(0.3 if part == 0 else 0)  # the first is done last
    report("stage_progress", stage="importance", done=part, total=10, unit="parts")
    return part**power, os.getpid(), torch.get_num_threads()


def test_results_come_in_order_from_several_processes(cluster: Cluster) -> None:
    results = cluster.map(square, range(5), 2)
    assert [value for value, _, _ in results] == [0, 1, 4, 9, 16]
    assert len({process for _, process, _ in results}) >= 2
    assert {threads for _, _, threads in results} == {1}
    assert cluster.map(square, [], 2) == []


def test_progress_of_the_parts_is_added_up(cluster: Cluster) -> None:
    told: list[int] = []

    def listen(event: Event) -> None:
        if event.kind == "stage_progress":
            told.append(event.fields["done"])

    cluster.events.add(listen)
    cluster.map(square, [3, 4], 2)
    deadline = time.monotonic() + 10
    while 7 not in told and time.monotonic() < deadline:
        time.sleep(0.05)
    assert told[-1] == 7


def test_text_is_tokenised_by_tasks_to_the_same_bytes(
    cluster: Cluster, tiny_text: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one CPU each and no device; and what they made is there when it is asked for again."""
    source = Files(path=str(tiny_text))

    def store(name: str, **more: Any) -> bytes:
        found = tokens.build_tokens(
            source, tiny_llama, sequence_length=32, base=tmp_path, cache=Cache(tmp_path / name), **more
        )
        return (found.folder / "tokens.arrow").read_bytes()

    whole = store("one")
    monkeypatch.setattr(reading, "SHARD", 15_000)
    monkeypatch.setattr(tokens, "LARGE", 1)
    assert store("many", spread=cluster) == whole
    made = list((tmp_path / "many" / ".cache" / "shards").glob("*/DONE.json"))
    assert len(made) == len(list(source.shards(tmp_path, Cache(tmp_path)))) == 3


def study(part: int, report: Any) -> None:
    report("trial_progress", candidate_id=f"trial {part}", tokens=64)


def test_a_trial_in_a_part_is_told_as_it_is(cluster: Cluster) -> None:
    told: list[Event] = []
    cluster.events.add(told.append)
    cluster.map(study, [1, 2])
    deadline = time.monotonic() + 10
    while len(told) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sorted(event.fields["candidate_id"] for event in told) == ["trial 1", "trial 2"]
    assert all(event.fields["tokens"] == 64 for event in told)


def talk(part: int, report: Any) -> int:
    """As a loop does; returns what a copy, as another worker gets it, thinks was told before."""
    for number in range(30):
        report("trial_progress", candidate_id="", tokens=number)
        assert not report.stop_requested()
        report("note", text=f"{part}: {number}")
        time.sleep(0.04)
    return int(cloudpickle.loads(cloudpickle.dumps(report))._last_told)


def test_all_but_progress_arrives_and_in_order(cluster: Cluster) -> None:
    """Nothing of when it was told goes along with a reporter: the clock of another machine may be behind."""
    told: list[Event] = []
    cluster.events.add(told.append)
    assert cluster.map(talk, [0, 1]) == [0, 0]
    texts = [f"{part}: {number}" for part in (0, 1) for number in range(30)]
    deadline = time.monotonic() + 10
    while sum(event.kind == "note" for event in told) < len(texts) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sorted((e.fields["text"] for e in told if e.kind == "note"), key=lambda text: text[0]) == texts
    assert 2 <= sum(event.kind == "trial_progress" for event in told) < 20


def die_once(part: Path, report: Any) -> str:
    if not part.exists():
        part.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return part.name


def test_a_part_whose_worker_is_lost_is_done_again(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.map(die_once, [tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def too_large(part: int, report: Any) -> None:
    import torch

    torch.empty(2**50)


def test_memory_that_a_worker_cannot_have_is_no_traceback(cluster: Cluster) -> None:
    with pytest.raises(
        EnvironmentFailure, match=r"has too little memory: .*allocate.*; lower micro_batch"
    ) as caught:
        cluster.map(too_large, [0])
    assert "\n" not in caught.value.message and caught.value.exit_code == 3


def always_die(part: int, report: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_keep_dying_are_an_error(cluster: Cluster) -> None:
    with pytest.raises(EnvironmentFailure, match="a worker was lost"):
        cluster.map(always_die, [0])


FAILING = """
import sys
from pathlib import Path
from minitron_ray.core.errors import MinitronError
from minitron_ray.core.events import EventBus
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal

def fail(part, report):
    raise MinitronError("no")

with Cluster(ClusterSettings(), Path(sys.argv[1]), EventBus(), StopSignal()) as cluster:
    for told in range(1, 81):
        try:
            cluster.map(fail, [0])
        except MinitronError:
            continue
        sys.exit(f"call {told} did not fail")
print("told", told)
"""


def test_a_failure_does_not_abort_the_driver(tmp_path: Path) -> None:
    """Ray aborts a process that cancels a task whose failure it is still taking in; of 80 one was met."""
    command = [sys.executable, "-c", FAILING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "told 80\n"), done.stderr


def refuse(part: int, report: Any) -> None:
    if part == 1:
        raise MinitronError("part 1 cannot be done")
    time.sleep(60)


def test_a_failure_ends_the_others(cluster: Cluster) -> None:
    started = time.monotonic()
    with pytest.raises(MinitronError, match="part 1 cannot be done"):
        cluster.map(refuse, [0, 1])
    assert time.monotonic() - started < 30
    assert [value for value, _, _ in cluster.map(square, [2], 3)] == [8]  # the slots are free again


def sleep(part: int, report: Any) -> None:
    time.sleep(60)


def test_a_stop_ends_all_parts(tmp_path: Path, cluster: Cluster) -> None:
    asked = threading.Timer(1.0, cluster.stop.request)
    asked.start()
    with pytest.raises(Interrupted):
        cluster.map(sleep, [0, 1, 2])
