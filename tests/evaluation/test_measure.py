"""Validation loss against transformers' own, and what must not change it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_ray.distillation.teacher import OnlineTeacher
from minitron_ray.evaluation.measure import Measurement, measure
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build
from tests.processes import begin_group

IDS = np.random.default_rng(0).integers(0, 256, (5, 24))
CPU = torch.device("cpu")


def model(folder: Path) -> Headless:
    checkpoint = Checkpoint(folder)
    return Headless(build(checkpoint.config, checkpoint, dtype=torch.float32, device=CPU, trainable=False))


def run(subject: Headless | None, batch: int, teacher: OnlineTeacher | None = None) -> Measurement:
    return measure(
        subject,
        IDS,
        range(5),
        dtype=torch.float32,
        device=CPU,
        batch=batch,
        teacher_hidden=teacher.hidden if teacher else None,
        teacher_head=teacher.head if teacher else None,
    )


def test_losses_are_those_of_transformers(tiny_llama: Path) -> None:
    subject = model(tiny_llama)
    measured = run(subject, batch=2)
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        expected = [subject.model(row[None], labels=row[None]).loss.item() for row in ids]
    np.testing.assert_allclose(measured.losses, expected, rtol=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert measured.divergences is None


def test_the_batch_size_does_not_show(tiny_llama: Path) -> None:
    subject = model(tiny_llama)
    np.testing.assert_allclose(run(subject, 1).losses, run(subject, 5).losses, rtol=1e-6)


def test_a_model_does_not_diverge_from_itself_and_a_damaged_one_does(tiny_llama: Path) -> None:
    teacher = OnlineTeacher(model(tiny_llama))
    assert run(model(tiny_llama), 2, teacher).divergence == pytest.approx(0.0, abs=1e-6)
    damaged = model(tiny_llama)
    with torch.no_grad():
        damaged.model.model.layers[0].mlp.up_proj.weight.zero_()
    divergences = run(damaged, 2, teacher).divergences
    assert divergences is not None and (divergences > 1e-3).all()
    np.testing.assert_array_equal(run(damaged, 2, teacher).losses, run(damaged, 2).losses)


def test_the_teacher_itself_is_measured_by_its_hidden_states(tiny_llama: Path) -> None:
    """As a subject it is the same model, which diverges from the teacher by nothing at all."""
    teacher = OnlineTeacher(model(tiny_llama))
    own = run(None, 2, teacher)
    np.testing.assert_array_equal(own.losses, run(model(tiny_llama), 2).losses)
    assert own.divergences is not None and not own.divergences.any() and len(own.divergences) == len(IDS)


def test_shares_of_two_ranks_make_up_the_whole(tiny_llama: Path, tmp_path: Path) -> None:
    """Two real processes under gloo, an odd number of sequences."""
    begin_group(_rank, 2, tiny_llama, tmp_path)
    both = [np.load(tmp_path / f"{rank}.npy") for rank in range(2)]
    np.testing.assert_array_equal(*both)
    np.testing.assert_allclose(both[0], run(model(tiny_llama), 2).losses, rtol=1e-6)


def _rank(rank: int, world: int, folder: Path, out: Path) -> None:
    store = torch.distributed.FileStore(str(out / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    measured = measure(
        model(folder), IDS, range(5), dtype=torch.float32, device=CPU, batch=2, rank=rank, world=world
    )
    np.save(out / f"{rank}.npy", measured.losses)
    torch.distributed.destroy_process_group()


def test_statistics() -> None:
    measured = Measurement(losses=np.asarray([1.0, 2.0, 3.0]), divergences=None)
    assert measured.loss == 2.0 and measured.stderr == pytest.approx(1 / math.sqrt(3))
    assert Measurement(losses=np.asarray([800.0]), divergences=None).perplexity == math.inf
    assert math.isnan(Measurement(losses=np.asarray([1.0]), divergences=None).stderr)
