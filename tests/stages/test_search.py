"""What a search reads back from the tables: what is known, and who ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_ray.results.store import Store
from minitron_ray.search.choice import paired_bootstrap
from minitron_ray.search.cohorts import Known
from minitron_ray.stages.search import Ties, known_trials


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
        writer = f"{(row | more)['origin']}-{name}"
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


def test_where_all_failed_all_are_tried_again(store: Store) -> None:
    write(store, "a", [(0, 9.0), (10, 3.0)], "failed")
    write(store, "b", [(0, None)], "failed")
    known = known_trials(store, no_cost)
    assert set(known) == {"a", "b"} and not any(trial.failed for trial in known.values())


def test_a_measured_cost_is_read_back(store: Store) -> None:
    write(store, "a", [(0, 9.0), (10, 3.0)], "completed", latency=0.25)
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
