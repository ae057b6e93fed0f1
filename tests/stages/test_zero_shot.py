"""Which shapes are scored where there are too many, and which scores are read."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from minitron_ray.core.errors import MinitronError
from minitron_ray.execution.train_group import Worker
from minitron_ray.results.store import Store
from minitron_ray.search.space import Candidate
from minitron_ray.stages.entrant import Bench
from minitron_ray.stages.undistilled import Cuts, score, score_in_group
from minitron_ray.stages.zero_shot import evenly, extremes, read_zero_shot, scored, write
from tests.processes import begin_group
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


def cuts_of(bench: Bench, store: Store, total: int) -> Cuts:
    """Scored on three sequences, and written as the stage does."""
    return Cuts(
        setting=bench.setting,
        scores=bench.scores,
        stage="zero_shot",
        total=total,
        write=partial(write, store, 3),
        sequences=3,
    )


def test_a_cut_is_there_as_soon_as_it_is_scored(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> None:
    """A worker that is lost at its second cut leaves the first two, by the losses that they have."""
    bench, shapes = bench_of(tmp_path, tiny_llama, tiny_text)
    setting, candidates = bench.setting, [row.candidate for row in shapes.values()]
    cuts = cuts_of(bench, bench.store, len(candidates))
    told: list[int] = []

    def report(kind: str, **fields: Any) -> None:
        told.append(fields["done"])
        if len(told) == 2:
            raise OSError("the worker was lost")

    with pytest.raises(OSError, match="the worker was lost"):
        score(candidates, cuts, report)
    share, expected = setting.share(), {}
    for candidate in candidates[:2]:
        student = setting.student(candidate, bench.scores, share.device)
        expected[candidate.id] = setting.measure(student, share, first=3).loss
    assert len(candidates) > 2 and scored(bench.store, 3) == pytest.approx(expected)
    assert scored(bench.store, 4) == {}, "of another number of sequences"
    assert read_zero_shot(bench.store) == pytest.approx(expected)


def _rank(rank: int, world: int, candidates: list[Candidate], cuts: Cuts, out: Path) -> None:
    store = torch.distributed.FileStore(str(out / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    device = torch.device("cpu")
    share = cuts.setting.share(rank, world, device)
    layers = cuts.setting.undistilled(candidates[0], cuts.scores, share).model.base_model.layers
    sizes = {name: one for name, one in layers.named_parameters() if name.endswith("weight")}
    assert sizes
    for name, one in sizes.items():
        assert isinstance(one, DTensor) and not one.requires_grad, name
        assert one.to_local().numel() * world == one.numel(), name

    worker = Worker(
        rank=rank,
        world=world,
        device=device,
        report=lambda kind, **fields: None,
        stop_requested=lambda: False,
    )
    score_in_group((candidates, cuts), worker)
    torch.distributed.destroy_process_group()


def test_a_group_that_shares_each_cut_finds_the_same(
    tmp_path: Path, tiny_llama: Path, tiny_text: Path
) -> None:
    """Three sequences for two processes: one of them has a pass for the other's sake."""
    bench, shapes = bench_of(tmp_path, tiny_llama, tiny_text)
    candidates = [row.candidate for row in shapes.values()]
    found = {}
    for name in ("one", "two"):
        store = Store(tmp_path / name, "e", "r")
        cuts = cuts_of(bench, store, len(candidates))
        if name == "one":
            score(candidates, cuts, lambda kind, **fields: None)
        else:
            begin_group(_rank, 2, candidates, cuts, tmp_path)
        found[name] = read_zero_shot(store)
    assert len(found["one"]) == len(candidates) > 2
    assert found["two"] == pytest.approx(found["one"], abs=1e-6)
    assert len(set(found["one"].values())) == len(candidates), "cuts of unlike losses"
