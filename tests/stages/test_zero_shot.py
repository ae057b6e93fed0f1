"""Which shapes are scored where there are too many, and which scores are read."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.core.errors import MinitronError
from minitron_ray.results.store import Store
from minitron_ray.stages.zero_shot import evenly, extremes, read_zero_shot, score, scored
from tests.stages.test_baselines import bench_of


@pytest.mark.parametrize(("count", "most"), [(5, 9), (9, 9), (10, 9), (100, 9), (7, 1), (257, 256)])
def test_shapes_are_taken_evenly(count: int, most: int) -> None:
    found = evenly(range(count), most)
    assert len(found) == min(count, most) and found[0] == 0
    steps = {b - a for a, b in itertools.pairwise(found)}
    assert max(steps, default=1) - min(steps, default=1) <= 1


def test_a_cut_without_a_finite_loss_has_none(tmp_path: Path) -> None:
    store = Store(tmp_path, "e", "r")
    assert read_zero_shot(store) == {}
    rows = [{"candidate_id": "a", "val_loss": 3.5, "sequences": 4}, {"candidate_id": "b", "sequences": 4}]
    store.append("zero_shot", rows, writer="zero_shot", sequence=0)
    assert read_zero_shot(store) == {"a": 3.5}


def test_the_best_and_the_worst_of_those_with_a_loss() -> None:
    assert extremes({"a": 3.5, "b": None, "c": 3.25, "d": 9.0}) == ("c", "d")
    with pytest.raises(MinitronError, match=r"none of 2 undistilled cuts .* set search\.zero_shot: null"):
        extremes({"a": None, "b": None})


def test_a_cut_is_there_as_soon_as_it_is_scored(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> None:
    """A worker that is lost at its second cut leaves the first two, by the losses that they have."""
    bench, shapes = bench_of(tmp_path, tiny_llama, tiny_text)
    setting, candidates = bench.setting, [row.candidate for row in shapes.values()]
    told: list[int] = []

    def report(kind: str, **fields: Any) -> None:
        told.append(fields["done"])
        if len(told) == 2:
            raise OSError("the worker was lost")

    with pytest.raises(OSError, match="the worker was lost"):
        score(candidates, setting, bench.scores, bench.store, 3, len(candidates), report)
    share, expected = setting.share(), {}
    for candidate in candidates[:2]:
        student = setting.student(candidate, bench.scores, share.device)
        expected[candidate.id] = setting.measure(student, share, first=3).loss
    assert len(candidates) > 2 and scored(bench.store, 3) == pytest.approx(expected)
    assert scored(bench.store, 4) == {}, "of another number of sequences"
    assert read_zero_shot(bench.store) == pytest.approx(expected)
