"""What a search reads back from the tables: what is known, and who ties."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_ray.results.store import Store
from minitron_ray.search.choice import paired_bootstrap
from minitron_ray.search.cohorts import FINISHED, Cohorts, Known
from minitron_ray.search.halving import Halving
from minitron_ray.stages.reuse import reopen
from minitron_ray.stages.search import Ties, known_trials, taken_up


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, "x", "r")


def write(store: Store, name: str, rungs: list[tuple[int, float | None]], status: str, **more: Any) -> None:
    for place, (tokens, loss) in enumerate(rungs):
        last = place == len(rungs) - 1
        row = {
            "candidate_id": name,
            "rung": place,
            "tokens": tokens,
            "val_loss": loss,
            "final": last and status != "running",
            "status": status if last else "running",
            "cohort": 1,
            "origin": "search",
        }
        origin = (row | more)["origin"]
        writer = f"trial-{name}" if origin == "search" else f"baseline-{origin}-{name}"
        store.append("trials", [row | more], writer=writer, sequence=place)


def no_cost(candidate_id: str, row: Any) -> None:
    return None


def test_known_trials(store: Store) -> None:
    write(store, "a", [(0, 9.0), (10, 3.0), (20, 2.0)], "completed", cohort=0)
    write(store, "b", [(0, 9.0), (10, 4.0)], "running")
    write(store, "c", [(0, None)], "failed")
    write(store, "a", [(0, 9.0), (10, 1.0)], "completed", origin="random")  # a baseline of the same shape
    write(store, "d", [(0, 9.0)], "completed", origin="scratch")
    assert known_trials(store, no_cost) == {
        "a": Known(cohort=0, losses={0: 9.0, 10: 3.0, 20: 2.0}),
        "b": Known(cohort=1, losses={0: 9.0, 10: 4.0}),
        "c": Known(cohort=1, failed=True),
    }


def begin(known: Mapping[str, Known]) -> Cohorts:
    """Four shapes in one cohort, halved once."""
    rule = Halving(rungs=(10, 20), reduction=2)
    return Cohorts(
        trials=4,
        size=4,
        rule=rule,
        propose=lambda cohort, told, count: [] if cohort else ["a", "b", "c", "d"],
        known=known,
    )


def test_a_failed_trial_stays_failed_whenever_the_search_was_killed(store: Store) -> None:
    """Killed before the first completion or not at all: the same fates."""
    alone = begin({})
    for name, loss in (("a", 3.0), ("b", 2.0), ("c", 4.0)):
        alone.report(name, 10, loss)
    alone.fail("d")
    for name, loss in (("a", 3.0), ("b", 2.0), ("c", 4.0)):
        write(store, name, [(0, 9.0), (10, loss)], "running")
    write(store, "d", [(0, None)], "failed")
    again = taken_up(store, no_cost, begin)
    assert again.next(()) == alone.next(()) == "b"
    for cohorts in (alone, again):
        cohorts.report("b", 20, 1.0)
    assert dict(again.fates) == dict(alone.fates)
    assert again.fates["d"].state == "failed" and again.next(()) is FINISHED


def test_a_trial_is_not_tried_again_while_others_are_to_run(store: Store) -> None:
    write(store, "a", [(0, None)], "failed")
    again = taken_up(store, no_cost, begin)
    assert again.fates["a"].state == "failed" and again.next(()) == "b"


def test_where_all_failed_all_are_tried_again(store: Store) -> None:
    for name in ("a", "b", "c"):
        write(store, name, [(0, None)], "failed")
    write(store, "d", [(0, 9.0), (10, 3.0)], "failed")
    again = taken_up(store, no_cost, begin)
    assert [fate.state for fate in again.fates.values()] == ["running", "running", "running", "waiting"]
    rows = store.read("trials").to_pylist()
    assert all((row["status"], row["final"], row["reason"]) == ("running", False, None) for row in rows)
    assert {row["val_loss"] for row in rows if row["candidate_id"] == "d"} == {9.0, 3.0}, (
        "measured is measured"
    )


def test_a_failed_trial_that_is_opened_again_ends_as_if_it_had_not_failed(store: Store) -> None:
    """`d` is better than `b`, which won without it."""
    losses = {"a": 3.0, "b": 2.0, "c": 4.0, "d": 1.0}
    for name in "ac":
        write(store, name, [(0, 9.0), (10, losses[name])], "stopped")
    write(store, "b", [(0, 9.0), (10, 2.0), (20, 2.0)], "completed")
    write(store, "d", [(0, None)], "failed", reason="CUDA out of memory")
    assert taken_up(store, no_cost, begin).next(()) is FINISHED
    reopen(store)
    again, whole = taken_up(store, no_cost, begin), begin({})
    for cohorts in (again, whole):
        while isinstance(name := cohorts.next(()), str):
            known = cohorts.fates[name].state == "running"
            assert known
            for tokens in (10, 20):
                if cohorts.report(name, tokens, losses[name]).state != "running":
                    break
    assert dict(again.fates) == dict(whole.fates)
    assert {name for name, fate in again.fates.items() if fate.state == "completed"} == {"b", "d"}


def test_a_measured_cost_is_read_back(store: Store) -> None:
    """The first, as it decides while the search runs: each time a trial comes up again another is measured."""
    write(store, "a", [(0, 9.0), (10, 3.0)], "completed", latency=0.5)
    write(store, "a", [(0, 9.0)], "running", latency=0.25)
    assert known_trials(store, lambda name, row: row["latency"])["a"].cost == 0.25


def test_ties_are_judged_where_a_trial_stopped(store: Store) -> None:
    """`near` differs from the winner by noise after 10 tokens; `far` is worse on every sequence."""
    draw = np.random.default_rng(0).normal
    base = draw(3.0, 0.5, 24)
    losses = {
        ("winner", 10): base,
        ("winner", 20): base - 1.0,
        ("winner", 40): base - 2.0,
        ("near", 10): base + draw(0.0, 0.1, 24),
        ("far", 20): base - 0.9 + draw(0.0, 0.01, 24),
    }
    for (subject, tokens), values in losses.items():
        rows = [
            {"subject": subject, "phase": "search", "tokens": tokens, "sequence": 5 + n, "loss": float(loss)}
            for n, loss in enumerate(values)
        ]
        store.append("sequence_losses", rows[::-1], writer=f"trial-{subject}", sequence=tokens)
    assert paired_bootstrap(losses["near", 10], losses["winner", 10], seed=3).tied
    assert not paired_bootstrap(losses["far", 20], losses["winner", 20], seed=3).tied
    assert Ties(store, 3)("winner", {"near": 10, "far": 20}) == ["near"]
