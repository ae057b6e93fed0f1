"""A search that is killed again and again ends as one that was left alone: the same trials, the same winner."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.desk import HEAD, Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEARCH = (
    HEAD
    + """\
budget: {parameters: 75k, tolerance: 20%}
search:
  space: {layers: 2..4, hidden: [36, 42, 48], mlp: 48..96 by 8, heads: [3, 6]}
  trials: 8
  keep: ties
  retrain: {tokens: 4096, rungs: 3, batch: 4, learning_rate: 3e-3}
"""
)


@pytest.fixture
def desks(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> Iterator[tuple[Desk, Desk]]:
    one, other = (Desk.lay(tmp_path / name, tiny_llama, tiny_text) for name in ("alone", "killed"))
    for desk in (one, other):
        (desk.folder / "tiny.yaml").write_text(SEARCH)
    yield one, other
    for desk in (one, other):
        desk.clear()


def course(desk: Desk) -> dict[tuple[str, int], tuple[Any, ...]]:
    """All that the search wrote about its trials, but for the clock."""
    names = ("tokens", "val_loss", "val_divergence", "train_loss", "final", "status", "cohort", "origin")
    rows = desk.rows("trials")
    found = {(row["candidate_id"], row["rung"]): tuple(row[name] for name in names) for row in rows}
    assert len(found) == len(rows), "no rung is there twice"
    return found


def losses(desk: Desk) -> dict[tuple[Any, ...], float]:
    key = ("subject", "phase", "tokens", "sequence")
    rows = [row for row in desk.rows("sequence_losses") if row["phase"] in ("cut", "search")]
    return {tuple(row[name] for name in key): row["loss"] for row in rows}


def chosen(desk: Desk) -> list[str]:
    found: list[str] = json.loads((desk.run_folder() / "stages" / "search.json").read_bytes())["output"][
        "chosen"
    ]
    return found


def test_killed_three_times_at_random_moments(desks: tuple[Desk, Desk]) -> None:
    alone, killed = desks
    alone.run()
    whole = course(alone)
    assert {row[5] for key, row in whole.items() if row[4]} <= {"completed", "stopped"}
    assert len({candidate for candidate, _ in whole}) == 8
    lot = random.Random(4)
    for rows in sorted(lot.sample(range(2, len(whole) - 3), 3)):
        moment = rows, lot.uniform(0, 0.6)

        def seen(moment: tuple[int, float] = moment) -> bool:
            reached = len(list(killed.results.glob("tiny/*/tables/trials/*.arrow"))) >= moment[0]
            time.sleep(moment[1] if reached else 0)
            return reached

        code, _ = killed.stop_when(seen, signal.SIGKILL)
        assert code == -signal.SIGKILL
        assert not list(killed.results.glob("tiny/*/stages/search.json")), "killed too late to prove anything"
    killed.run()
    assert course(killed) == whole
    assert losses(killed) == losses(alone)
    assert chosen(killed) == chosen(alone)
    for desk in (alone, killed):
        assert not (desk.run_folder() / "trials").exists(), "checkpoints are gone at the end"
        assert (desk.run_folder() / "study.journal").exists()
