"""The stage `evaluate`, and what `correct` measures: a group that shares the models finds what one process does."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from minitron_ray.distillation.engine import Engine
from minitron_ray.evaluation.measure import Measurement
from minitron_ray.execution.train_group import Worker
from minitron_ray.stages.correct import measure_teacher_in_group
from minitron_ray.stages.evaluate import Subject, Subjects, measure_all, measure_in_group
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.writing import write_checkpoint
from tests.processes import begin_group
from tests.stages.test_baselines import bench_of

RANKS = 2


@pytest.fixture
def subjects(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> Subjects:
    """Two students, one as cut and one in a folder as a distilled one is, beside a teacher that runs."""
    bench, shapes = bench_of(tmp_path, tiny_llama, tiny_text)
    first, last = [row.candidate for row in shapes.values()][:: len(shapes) - 1]
    config, tensors = bench.setting.cut(last, bench.scores, torch.float32)
    write_checkpoint(tmp_path / "final", tensors.items(), config, dtype=torch.float32)
    students = (
        Subject(name="cut", candidate=first, scores=bench.scores),
        Subject(name="distilled", candidate=last, folder=tmp_path / "final"),
    )
    return Subjects(setting=bench.setting, students=students, signal=None)


def assert_shared(model: Headless, dtype: torch.dtype) -> None:
    """Of every layer each rank holds its part."""
    weights = list(model.model.base_model.layers.parameters())
    assert weights
    for one in weights:
        assert isinstance(one, DTensor) and one.dtype == dtype and not one.requires_grad
        assert one.ndim == 1 or one.to_local().numel() * RANKS == one.numel()


def _rank(rank: int, world: int, job: Subjects, out: Path) -> None:
    store = torch.distributed.FileStore(str(out / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    gc.disable()  # what goes by itself is not to depend on when it would run
    device, setting = torch.device("cpu"), job.setting
    share = setting.share(rank, world, device)
    assert_shared(setting.online_teacher(share).model, share.dtype)
    before: list[weakref.ref[Headless]] = []
    for student in job.students:
        opened = student.open(setting, share)
        assert all(one() is None for one in before), "of one that was measured nothing stays"
        assert_shared(opened, torch.float32)
        before.append(weakref.ref(opened))
        del opened
    worker = Worker(
        rank=rank,
        world=world,
        device=device,
        report=lambda kind, **fields: None,
        stop_requested=lambda: False,
    )
    found = [*measure_in_group(job, worker), measure_teacher_in_group(setting, worker)]
    np.save(out / f"{rank}.npy", values(found))
    torch.distributed.destroy_process_group()


def values(found: list[Measurement]) -> np.ndarray:
    """Losses and divergences, (models, 2, sequences)."""
    return np.asarray([(one.losses, one.divergences) for one in found])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_group_that_shares_the_models_finds_the_same(
    precision: str, subjects: Subjects, tmp_path: Path
) -> None:
    experiment = subjects.setting.experiment.model_copy(update={"precision": precision})
    setting = replace(subjects.setting, experiment=experiment, engine=Engine(teacher="sharded"))
    job = replace(subjects, setting=setting)
    alone = values(measure_all(job, lambda kind, **fields: None))
    begin_group(_rank, RANKS, job, tmp_path)
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in range(RANKS))
    assert np.array_equal(first, second)
    # Batches are cut elsewhere, which moves the last bits of the type of products.
    assert first[:3] == pytest.approx(alone, abs=1e-6 if precision == "float32" else 5e-3)
    assert first[3] == pytest.approx(first[0], abs=1e-6), "before it is corrected a teacher is measured alike"
    assert alone[0, 1].max() < 1e-6 < alone[1:, 1].min(), "students diverge, the teacher does not"
