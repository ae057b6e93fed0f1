"""Cohorts on real Ray Tune: waiting, going on, failing, dying, stopping. The trials only write down what they do."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.core.events import EventBus
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings, Resources
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.tune_search import SearchRequest, run_search
from minitron_ray.search.cohorts import Cohorts, Known
from minitron_ray.search.halving import Fate, Halving
from minitron_ray.search.propose import Told

pytestmark = pytest.mark.ray

RULE = Halving(rungs=(10, 20, 40), reduction=2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = ClusterSettings(trial=Resources(cpus=1))
    with Cluster(settings, tmp_path_factory.mktemp("run"), EventBus(), StopSignal()) as cluster:
        yield cluster


def loss(name: str, tokens: int) -> float:
    return random.Random(name).random() + 10 / (1 + tokens)


def objective(candidate_id: str, report: Any, reporter: Any, *, folder: Path, slow: float = 0.0) -> None:
    """Keeps a line a rung it computed, with its process; `bad` raises, `dies` ends its process once, `gone` until
    it is told not to, `full` finds no room on the disk until it is told that there is."""
    log = folder / candidate_id
    done = log.read_text().splitlines() if log.exists() else []
    for place, tokens in enumerate((0, *RULE.rungs)):
        if place >= len(done):
            time.sleep(slow)
            if candidate_id.startswith("bad") and tokens == 20:
                raise ValueError("first line\nno such shape")
            if candidate_id.startswith("dies") and tokens == 20 and not (folder / "died").exists():
                (folder / "died").touch()
                os._exit(1)
            if candidate_id.startswith("gone") and tokens == 20 and not (folder / "stays").exists():
                os._exit(1)
            if candidate_id.startswith("full") and tokens == 10 and not (folder / "room").exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            with log.open("a") as file:
                file.write(f"{tokens} {os.getpid()}\n")
        report({"tokens": tokens, "val_loss": loss(candidate_id, tokens), "final": tokens == 40})
        if reporter.stop_requested():
            return


@dataclass
class Notes:
    """What the record hears."""

    rungs: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    ends: dict[str, tuple[Fate, str | None]] = field(default_factory=dict)

    def rung(self, candidate_id: str, result: dict[str, Any]) -> None:
        self.rungs[candidate_id][result["tokens"]] = result["val_loss"]

    def ended(self, candidate_id: str, fate: Fate, reason: str | None) -> None:
        assert fate.state == "failed" or fate.tokens in self.rungs[candidate_id], (
            "ended before it was recorded"
        )
        self.ends[candidate_id] = (fate, reason)


def request(
    folder: Path, cohorts: Sequence[Sequence[str]], known: dict[str, Known] | None = None, slow: float = 0.0
) -> SearchRequest:
    def propose(cohort: int, told: Sequence[Told], count: int) -> list[str]:
        return list(cohorts[cohort]) if cohort < len(cohorts) else []

    state = Cohorts(trials=100, size=100, rule=RULE, propose=propose, known=known)
    return SearchRequest(
        objective=partial(objective, folder=folder, slow=slow), cohorts=state, cost=lambda name, result: None
    )


def trained(folder: Path) -> dict[str, list[int]]:
    """Rungs that were computed, by candidate."""
    return {
        path.name: [int(line.split()[0]) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
        if path.name not in ("died", "room", "stays")
    }


def expected(names: Sequence[str]) -> dict[str, int]:
    """How far each gets, by hand: half of them after each of the first two rungs."""
    ordered = sorted(names, key=lambda name: (loss(name, 0), name))
    first = len(names) // 2
    second = first // 2
    return {name: 40 if place < second else 20 if place < first else 10 for place, name in enumerate(ordered)}


def test_a_stop_and_going_on(tmp_path: Path) -> None:
    """What is known at a stop is not computed again. Among the first, as its clusters are its own."""
    names = [f"a{number}" for number in range(4)]
    folder, notes = tmp_path / "logs", Notes()
    folder.mkdir()
    settings, stop = ClusterSettings(trial=Resources(cpus=1)), StopSignal()
    with Cluster(settings, tmp_path / "run", EventBus(), stop) as cluster:
        timer = threading.Thread(target=_stop_once_begun, args=(folder, names, stop))
        timer.start()
        run_search(cluster, request(folder, [names], slow=0.4), notes)
        timer.join()
    assert "completed" not in {fate.state for fate, _ in notes.ends.values()}
    known = {name: Known(cohort=0, losses=dict(rungs)) for name, rungs in notes.rungs.items()}
    with Cluster(settings, tmp_path / "again", EventBus(), StopSignal()) as cluster:
        run_search(cluster, request(folder, [names], known), notes)
    assert {name: fate.tokens for name, (fate, _) in notes.ends.items()} == expected(names)
    assert trained(folder) == {
        name: [tokens for tokens in (0, *RULE.rungs) if tokens <= last]
        for name, last in expected(names).items()
    }


def test_what_the_machine_breaks_off_has_not_failed(tmp_path: Path) -> None:
    """A full disk, then a process that is lost again and again: each ends the search, with nothing decided on
    the candidate; in the end all is as if nothing had been. Its clusters are its own, too."""
    names = ["full0", "gone0"]  # better than the others: they go on past the rungs where they are broken off
    names += sorted((f"c{n}" for n in range(40)), key=lambda name: -loss(name, 0))[:2]
    assert max(loss(name, 0) for name in names[:2]) < min(loss(name, 0) for name in names[2:])
    folder, notes = tmp_path / "logs", Notes()
    folder.mkdir()

    def attempt(run: str) -> None:
        known = {name: Known(cohort=0, losses=dict(rungs)) for name, rungs in notes.rungs.items()}
        settings = ClusterSettings(trial=Resources(cpus=1))
        with Cluster(settings, tmp_path / run, EventBus(), StopSignal()) as cluster:
            asked = replace(request(folder, [names], known), shape=lambda name: f"shape of {name}")
            run_search(cluster, asked, notes)

    with pytest.raises(
        EnvironmentFailure, match=r"^shape of full0: .*No space left on device; mend that, then run"
    ):
        attempt("full")
    assert not notes.ends and notes.rungs["full0"].keys() == {0}, "its rows stay"
    (folder / "room").touch()
    with pytest.raises(
        EnvironmentFailure, match=r"^shape of gone0: its process was lost.*; see logs/.*run the same command"
    ):
        attempt("gone")
    assert "failed" not in {fate.state for fate, _ in notes.ends.values()}
    (folder / "stays").touch()
    attempt("again")
    assert {name: fate.tokens for name, (fate, _) in notes.ends.items()} == expected(names)
    assert {name: max(rungs) for name, rungs in trained(folder).items()} == expected(names)
    assert all(len(set(rungs)) == len(rungs) for rungs in trained(folder).values()), "no rung is made twice"


def test_what_cannot_be_written_ends_the_search_in_its_words(tmp_path: Path) -> None:
    """A row, and the study before a cohort: not as a traceback of Ray Tune's. Trials are asked to stop for it, so the
    clusters are its own."""

    class Full(Notes):
        def rung(self, candidate_id: str, result: dict[str, Any]) -> None:
            if result["tokens"] == 20:
                raise EnvironmentFailure("cannot write to trials: no space left on device; free this one")
            super().rung(candidate_id, result)

    def propose(cohort: int, told: Sequence[Told], count: int) -> list[str]:
        if cohort:
            raise EnvironmentFailure("cannot write to study.journal: no space left on device; free this one")
        return ["c0", "c1"]

    rows, study, notes = tmp_path / "rows", tmp_path / "study", Full()
    rows.mkdir(), study.mkdir()
    begun = replace(request(study, []), cohorts=Cohorts(trials=4, size=2, rule=RULE, propose=propose))
    settings = ClusterSettings(trial=Resources(cpus=1))
    with (
        Cluster(settings, tmp_path / "first", EventBus(), StopSignal()) as cluster,
        pytest.raises(EnvironmentFailure, match=r"^cannot write to trials: .*; free this one$"),
    ):
        run_search(cluster, request(rows, [["c0", "c1", "c2", "c3"]]), notes)
    assert max(tokens for rungs in notes.rungs.values() for tokens in rungs) == 10
    with (
        Cluster(settings, tmp_path / "second", EventBus(), StopSignal()) as cluster,
        pytest.raises(EnvironmentFailure, match=r"^cannot write to study.journal: .*; free this one$"),
    ):
        run_search(cluster, begun, Notes())
    assert len(trained(study)) == 2


def test_cohorts_one_after_the_other(cluster: Cluster, tmp_path: Path) -> None:
    cohorts = [[f"a{number}" for number in range(8)], [f"b{number}" for number in range(4)]]
    notes = Notes()
    run_search(cluster, request(tmp_path, cohorts), notes)
    far = expected(cohorts[0]) | expected(cohorts[1])
    assert {name: fate.tokens for name, (fate, _) in notes.ends.items()} == far
    assert trained(tmp_path) == {
        name: [tokens for tokens in (0, *RULE.rungs) if tokens <= last] for name, last in far.items()
    }
    processes = {line.split()[1] for path in tmp_path.iterdir() for line in path.read_text().splitlines()}
    assert len(processes) <= 2 * cluster.concurrent_trials(), "processes are used again"


def test_one_that_raises_and_one_whose_process_dies(cluster: Cluster, tmp_path: Path) -> None:
    good = ["dies0", "bad0"]
    others = sorted((f"c{n}" for n in range(40)), key=lambda name: -loss(name, 0))[:2]  # worse than both
    assert max(loss(name, 0) for name in good) < min(loss(name, 0) for name in others)
    notes = Notes()
    run_search(cluster, request(tmp_path, [[*good, *others]]), notes)
    states = {name: (fate.state, reason) for name, (fate, reason) in notes.ends.items()}
    assert states == {
        "dies0": ("completed", None),
        "bad0": ("failed", "no such shape"),
        **dict.fromkeys(others, ("stopped", None)),
    }
    assert (tmp_path / "died").exists() and trained(tmp_path)["dies0"] == [0, 10, 20, 40]


def test_the_runner_up_takes_the_place_of_the_only_survivor(cluster: Cluster, tmp_path: Path) -> None:
    other = next(f"c{n}" for n in range(40) if loss(f"c{n}", 0) > loss("bad0", 0))
    notes = Notes()
    run_search(cluster, request(tmp_path, [["bad0", other]]), notes)
    assert {name: fate.state for name, (fate, _) in notes.ends.items()} == {
        "bad0": "failed",
        other: "completed",
    }
    assert trained(tmp_path) == {"bad0": [0, 10], other: [0, 10, 20, 40]}


def _stop_once_begun(folder: Path, names: Sequence[str], stop: StopSignal) -> None:
    """When two of the trials have begun."""
    deadline = time.monotonic() + 60
    while sum((folder / name).exists() for name in names) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    stop.request()
