"""What a worker does for a baseline: the students it begins with, the recipe, and the rows it leaves."""

from __future__ import annotations

import errno
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.core.events import EventBus
from minitron_ray.core.loading import load
from minitron_ray.execution.cluster import GroupSize
from minitron_ray.execution.settings import Resources
from minitron_ray.execution.stop import StopSignal
from minitron_ray.execution.train_group import Worker
from minitron_ray.experiment import Experiment
from minitron_ray.importance.controls import control_scores
from minitron_ray.plan import make_plan
from minitron_ray.results.cache import Cache
from minitron_ray.results.files import folder_size
from minitron_ray.results.store import Store
from minitron_ray.search.baselines import Baseline
from minitron_ray.stages.baselines import endings, forget_other_winners, write_cut
from minitron_ray.stages.entrant import Bench, Entrant, train_entrant, train_in_group
from minitron_ray.stages.prepare import prepare
from minitron_ray.stages.trial import Objective
from minitron_ray.stages.undistilled import Cuts, score
from tests.processes import begin_group

FIGURES = ("tokens", "val_loss", "val_divergence", "train_loss", "final", "status")


class Killed(BaseException):
    """What no handler of errors takes for one, as the end of a process."""


class Told(list[tuple[str, dict[str, Any]]]):
    """Events in the order in which a worker reports them. Behind the step that ends at so many tokens the worker
    is killed, or raises an error; or it is asked to stop with that step."""

    def __init__(
        self,
        killed_at: int | None = None,
        error: BaseException | None = None,
        stopped_at: int | None = None,
    ) -> None:
        super().__init__()
        self._killed_at, self._error, self._stopped_at = killed_at, error or Killed(), stopped_at

    def __call__(self, kind: str, **fields: Any) -> None:
        self.append((kind, fields))
        if kind == "stage_progress" and fields["done"] == self._killed_at:
            raise self._error

    @property
    def steps(self) -> list[int]:
        """The tokens at which optimizer steps ended."""
        return [fields["done"] for kind, fields in self if kind == "stage_progress"]

    def stop_requested(self) -> bool:
        """Asked once a step, before it ends, and by whoever waits for a group."""
        return self._stopped_at is not None and len(self.steps) + 1 >= self._stopped_at // 128


def bench_of(tmp_path: Path, model: Path, text: Path, *overrides: str) -> tuple[Bench, dict[str, Any]]:
    """A bench with the teacher online, units ranked by lot, and its feasible shapes by text."""
    (tmp_path / "x.yaml").write_text(
        f"""
name: x
seed: 3
precision: float32
teacher: {{path: {model}}}
data:
  source: {{kind: files, path: {text}/**/*.txt}}
  sequence_length: 32
  calibration: 4
  validation: 4
budget: {{parameters: 75k, tolerance: 20%}}
search:
  space: {{layers: 3..4, mlp: [48, 64]}}
  retrain: {{tokens: 1024, rungs: 2, batch: 4, learning_rate: 3e-3}}
  baselines: [random, largest_first, magnitude, scratch]
"""
    )
    experiment, _ = load(tmp_path / "x.yaml", Experiment, overrides)
    ready = prepare(experiment, tmp_path, Cache(tmp_path / "cache"), EventBus(), StopSignal(), micro_batch=4)
    setting = ready.setting
    scores = control_scores("random", 0, setting.checkpoint, setting.family, setting.architecture)
    shapes = {row.candidate.shape_text(): row for row in make_plan(experiment, ready.config).feasible}
    store = Store(tmp_path / "run", "x", "1")
    states = tmp_path / "states"
    return Bench(setting=setting, scores=scores, signal=None, store=store, states=states), shapes


@pytest.fixture
def bench(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> tuple[Bench, dict[str, Any]]:
    return bench_of(tmp_path, tiny_llama, tiny_text)


def trained(bench: Bench, origin: Baseline, shape: Any) -> tuple[list[dict[str, Any]], Told]:
    """The rows of `trials` of one entrant, and what its worker said."""
    told = Told()
    train_entrant(Entrant(origin=origin, shape=shape), bench, 1024, told)
    rows = [row for row in bench.store.read("trials").to_pylist() if row["origin"] == origin]
    return sorted(rows, key=lambda row: row["rung"]), told


def losses_of(bench: Bench, subject: str) -> dict[tuple[int, int], float]:
    rows = bench.store.read("sequence_losses").to_pylist()
    return {(r["tokens"], r["sequence"]): r["loss"] for r in rows if r["subject"] == subject}


def test_a_shape_cut_by_importance_gets_what_its_trial_gets(bench: tuple[Bench, dict[str, Any]]) -> None:
    bench_, shapes = bench
    shape = next(iter(shapes.values()))
    rungs: list[dict[str, Any]] = []
    candidates = {shape.candidate.id: shape.candidate}
    trial = Objective(
        setting=bench_.setting, scores=bench_.scores, candidates=candidates, signal=None, checkpoints=None
    )
    trial(shape.candidate.id, rungs.append, Told())
    rows, told = trained(bench_, "random", shape)
    assert [row["tokens"] for row in rows] == [0, 512, 1024]
    for row, rung in zip(rows, rungs, strict=True):
        for name in ("tokens", "val_loss", "val_divergence", "train_loss", "final"):
            assert row[name] == rung[name], name
    assert [row["status"] for row in rows] == ["running", "running", "completed"]
    assert {row["parameters"] for row in rows} == {shape.parameters}
    name = f"random:{shape.candidate.id}"
    first = bench_.setting.splits.validation.start
    expected = {(r["tokens"], first + i): x for r in rungs for i, x in enumerate(r["losses"])}
    assert losses_of(bench_, name) == expected
    kinds = [kind for kind, _ in told]
    assert kinds[0] == "trial_started" and kinds[-1] == "trial_finished"
    assert told.steps == list(range(128, 1025, 128))
    assert told[-1][1]["val_loss"] == rows[-1]["val_loss"] and told[-1][1]["status"] == "completed"


def test_a_copy_is_the_same_trial_under_another_origin(bench: tuple[Bench, dict[str, Any]]) -> None:
    bench_, shapes = bench
    shape = next(iter(shapes.values()))
    rows, _ = trained(bench_, "random", shape)
    entrant, name = Entrant(origin="largest_first", shape=shape), shape.candidate.id
    bench_.copy(entrant, rows, f"random:{name}")
    all_rows = bench_.store.read("trials").to_pylist()
    copies = [row for row in all_rows if row["origin"] == "largest_first"]
    assert all(row["copied"] for row in copies) and not any(row["copied"] for row in rows)
    assert [row | {"origin": "random", "copied": None} for row in copies] == rows
    assert losses_of(bench_, entrant.subject) == losses_of(bench_, f"random:{name}")
    assert set(endings(bench_.store)) == {("random", name), ("largest_first", name)}


def test_scratch_has_nothing_of_the_teacher(bench: tuple[Bench, dict[str, Any]], tiny_llama: Path) -> None:
    bench_, shapes = bench
    shape = next(iter(shapes.values()))
    student = bench_.student(Entrant(origin="scratch", shape=shape), bench_.setting.share())
    config = AutoConfig.from_pretrained(tiny_llama)
    config.num_hidden_layers, config.intermediate_size = shape.candidate.layers, shape.candidate.mlp
    torch.manual_seed(3)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    ours = student.model.state_dict()
    assert stock.keys() == ours.keys() and all(torch.equal(stock[name], ours[name]) for name in stock)
    rows, _ = trained(bench_, "scratch", shape)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"], "it learns"


def test_magnitude_keeps_the_neurons_of_largest_norm(
    bench: tuple[Bench, dict[str, Any]], tiny_llama: Path
) -> None:
    bench_, shapes = bench
    shape = next(row for row in shapes.values() if row.candidate.layers == 4 and row.candidate.mlp == 48)
    student = bench_.student(Entrant(origin="magnitude", shape=shape), bench_.setting.share())
    teacher = load_file(tiny_llama / "model.safetensors")
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp."
        up, gate = teacher[f"{prefix}up_proj.weight"], teacher[f"{prefix}gate_proj.weight"]
        down = teacher[f"{prefix}down_proj.weight"]
        norms = up.square().sum(1) + gate.square().sum(1) + down.square().sum(0)
        kept = sorted(np.argsort(-norms.numpy())[:48].tolist())
        assert torch.equal(student.model.state_dict()[f"{prefix}up_proj.weight"], up[kept])
    other = bench_.student(Entrant(origin="random", shape=shape), bench_.setting.share())
    assert not torch.equal(other.model.model.layers[0].mlp.up_proj.weight, up[kept])


def test_a_cut_is_scored_as_the_trial_measures_it_first(bench: tuple[Bench, dict[str, Any]]) -> None:
    bench_, shapes = bench
    shape = next(iter(shapes.values()))
    entrant = Entrant(origin="largest_first", shape=shape)
    cuts = Cuts(
        setting=bench_.setting,
        scores=bench_.scores,
        stage="baselines",
        total=1,
        write=partial(write_cut, bench_, {entrant.candidate_id: entrant}),
    )
    score([shape.candidate], cuts, Told())
    [scored] = bench_.store.read("trials").to_pylist()
    assert scored["rung"] == scored["tokens"] == 0 and not scored["final"]
    rows, _ = trained(bench_, "largest_first", shape)
    assert rows[0]["val_loss"] == scored["val_loss"]


def test_a_student_that_cannot_be_trained_is_a_row_and_no_crash(
    tmp_path: Path, tiny_llama: Path, tiny_text: Path
) -> None:
    bench, shapes = bench_of(tmp_path, tiny_llama, tiny_text, "search.retrain.learning_rate=1e30")
    shape = next(iter(shapes.values()))
    rows, told = trained(bench, "scratch", shape)
    assert rows[-1]["status"] == "failed" and rows[-1]["final"]
    assert "are not finite" in rows[-1]["reason"] and "lower learning_rate" in rows[-1]["reason"]
    assert rows[-1]["val_loss"] is not None and rows[-1]["tokens"] == 0, "what was measured stays"
    assert told[-1] == (
        "trial_finished",
        {
            "candidate_id": f"scratch:{shape.candidate.id}",
            "status": "failed",
            "val_loss": rows[-1]["val_loss"],
            "tokens": 0,
            "reason": rows[-1]["reason"],
            "shape": f"scratch {shape.candidate.shape_text()}",
        },
    )


@pytest.mark.parametrize(
    ("origin", "killed_at", "again_from"),
    [("largest_first", 512, 0), ("magnitude", 640, 512), ("scratch", 1024, 512)],
)
def test_one_that_is_killed_goes_on_from_its_last_rung(
    bench: tuple[Bench, dict[str, Any]], tmp_path: Path, origin: Baseline, killed_at: int, again_from: int
) -> None:
    """Bit by bit as one that was not killed. Behind the step at 512 tokens the rung is not measured yet."""
    bench_, shapes = bench
    entrant = Entrant(origin=origin, shape=next(iter(shapes.values())))
    whole = replace(bench_, store=Store(tmp_path / "whole", "x", "1"), states=tmp_path / "others")
    rows, _ = trained(whole, origin, entrant.shape)
    with pytest.raises(Killed):
        train_entrant(entrant, bench_, 1024, Told(killed_at))
    assert bench_.folder(entrant).exists() == (again_from > 0)
    again, told = trained(bench_, origin, entrant.shape)
    assert told.steps == list(range(again_from + 128, 1025, 128))
    for row, other in zip(rows, again, strict=True):
        assert [row[name] for name in FIGURES] == [other[name] for name in FIGURES]
    assert losses_of(bench_, entrant.subject) == losses_of(whole, entrant.subject)
    assert not bench_.folder(entrant).exists() and not whole.folder(entrant).exists()


@pytest.mark.parametrize(
    ("told", "again_from"),
    [
        (Told(640, OSError(errno.ENOSPC, "No space left on device")), 512),
        (Told(640, torch.OutOfMemoryError("CUDA out of memory.")), 512),
        (Told(stopped_at=640), 640),
    ],
    ids=["disk", "memory", "stop"],
)
def test_what_the_machine_or_the_user_ends_has_not_failed(
    bench: tuple[Bench, dict[str, Any]], tmp_path: Path, told: Told, again_from: int
) -> None:
    """It goes on from its state, to the rows of one that nothing ended."""
    bench_, shapes = bench
    entrant = Entrant(origin="scratch", shape=next(iter(shapes.values())))
    whole = replace(bench_, store=Store(tmp_path / "whole", "x", "1"), states=tmp_path / "others")
    rows, _ = trained(whole, "scratch", entrant.shape)
    said = pytest.raises(EnvironmentFailure, match=f"^{re.escape(entrant.text)}.*run the same command again")
    with nullcontext() if again_from == 640 else said:
        left = train_entrant(entrant, bench_, 1024, told)
        assert left == folder_size(bench_.folder(entrant)) >= 12 * entrant.shape.parameters
    assert not endings(bench_.store) and bench_.folder(entrant).exists()
    assert "trial_finished" not in {kind for kind, _ in told}
    again, heard = trained(bench_, "scratch", entrant.shape)
    assert heard.steps == list(range(again_from + 128, 1025, 128))
    for row, other in zip(rows, again, strict=True):
        assert [row[name] for name in FIGURES] == [other[name] for name in FIGURES]
    assert not bench_.folder(entrant).exists()


def _rank(rank: int, world: int, bench: Bench, entrants: list[Entrant], out: Path) -> None:
    file = torch.distributed.FileStore(str(out / "rendezvous"), world)
    torch.distributed.init_process_group("gloo", store=file, rank=rank, world_size=world)

    def worker(killed_at: int | None = None) -> Worker:
        told = Told(killed_at)
        return Worker(
            rank=rank, world=world, device=torch.device("cpu"), report=told, stop_requested=lambda: False
        )

    for entrant in entrants:
        with pytest.raises(Killed):
            train_in_group((entrant, bench, 1024), worker(640))
        resumed = worker()
        train_in_group((entrant, bench, 1024), resumed)
        assert resumed.report.steps == [640, 768, 896, 1024]  # type: ignore[attr-defined]
    torch.distributed.destroy_process_group()


def test_a_group_leaves_the_rows_that_one_process_leaves(
    bench: tuple[Bench, dict[str, Any]], tmp_path: Path
) -> None:
    """Two real processes under gloo that share each student, killed in the middle of it and begun again."""
    alone, shapes = bench
    shape = next(iter(shapes.values()))
    origins: tuple[Baseline, ...] = ("largest_first", "magnitude", "scratch")
    entrants = [Entrant(origin=origin, shape=shape) for origin in origins]
    size = GroupSize(workers=2, each=Resources(cpus=1), storage=tmp_path)
    store, states = Store(tmp_path / "group", "x", "1"), tmp_path / "shards"
    group = replace(alone, group=size, store=store, states=states)
    begin_group(_rank, 2, group, entrants, tmp_path)
    for entrant in entrants:
        rows, _ = trained(alone, entrant.origin, shape)
        others = [row for row in group.store.read("trials").to_pylist() if row["origin"] == entrant.origin]
        assert [row["tokens"] for row in others] == [0, 512, 1024]
        for row, other in zip(rows, sorted(others, key=lambda row: row["rung"]), strict=True):
            assert all(other[name] == pytest.approx(row[name], abs=1e-4) for name in FIGURES)
        ours, theirs = losses_of(alone, entrant.subject), losses_of(group, entrant.subject)
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_what_stood_beside_another_winner_is_dropped(bench: tuple[Bench, dict[str, Any]]) -> None:
    """After a failed trial was tried again and won; a shape by lot stands whoever wins."""
    bench_, shapes = bench
    before, winner = list(shapes.values())[:2]
    origins: tuple[Baseline, ...] = ("random", "magnitude", "scratch")
    entrants = [Entrant(origin=origin, shape=shape) for origin in origins for shape in (before, winner)]
    for entrant in entrants:
        bench_.write(entrant, entrant.trial_row(0, "failed", reason="x"))
        bench_.write_losses(entrant, 0, 0, {4: 1.0})
    plan = make_plan(bench_.setting.experiment, bench_.setting.checkpoint.config)
    forget_other_winners(plan, bench_, winner.candidate.id)
    left = [entrant for entrant in entrants if entrant.origin == "random" or entrant.shape is winner]
    assert set(endings(bench_.store)) == {(entrant.origin, entrant.candidate_id) for entrant in left}
    losses = bench_.store.read("sequence_losses").to_pylist()
    assert {row["subject"] for row in losses} == {entrant.subject for entrant in left}
