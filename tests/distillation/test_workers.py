"""Training on two real processes under gloo: the same figures as on one, however it is carried out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from minitron_ray.data.batches import batch_indices
from minitron_ray.distillation.engine import Engine
from minitron_ray.distillation.loop import Data, Recipe, Share, Step, make_optimizer, train
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.sharding import FrozenSharding, Sharding
from minitron_ray.distillation.teacher import OnlineTeacher
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build
from tests.processes import begin_group

LENGTH, BATCH, STEPS = 16, 5, 50
"""Five sequences on two workers: one of them has nothing to do in the last pass."""
TOKENS = np.random.default_rng(0).integers(0, 256, (60, LENGTH))
CPU = torch.device("cpu")
RECIPE = Recipe(
    loss=ForwardKL(),
    schedule=Schedule(peak=3e-3, minimum=0.0, warmup=0.1, tokens=STEPS * BATCH * LENGTH),
    batch=BATCH,
    sequence_length=LENGTH,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    clip=1.0,
)
SHORT = Schedule(peak=3e-3, minimum=0.0, warmup=0.1, tokens=3 * BATCH * LENGTH)
DATA = Data(batch=lambda step: batch_indices(range(60), step - 1, BATCH, 0), sequences=lambda i: TOKENS[i])
HOW = {
    "plain": (torch.float32, Engine()),
    "recomputed": (torch.float32, Engine(recompute=True)),
    "bfloat16": (torch.bfloat16, Engine()),
}


def damaged(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a copy of the teacher that has something to learn."""
    checkpoint, noise = Checkpoint(folder), torch.Generator().manual_seed(1)
    return {
        name: checkpoint.tensor(name) + 0.05 * torch.randn(checkpoint.tensor(name).shape, generator=noise)
        for name in checkpoint.names()
    }


def student_of(folder: Path, share: Share, engine: Engine) -> Headless:
    sharding = Sharding(share.world, CPU, share.dtype, engine)
    config = Checkpoint(folder).config
    student = Headless(build(config, damaged(folder), trainable=True, each_layer=sharding.layer))
    sharding.rest(student)
    return student


def teacher_of(folder: Path, share: Share) -> OnlineTeacher:
    checkpoint = Checkpoint(folder)
    if share.world == 1:
        return OnlineTeacher(Headless(build(checkpoint.config, checkpoint, dtype=share.dtype)))
    sharding = FrozenSharding(share.world, CPU)
    model = Headless(build(checkpoint.config, checkpoint, dtype=share.dtype, each_layer=sharding.layer))
    sharding.rest(model, model.head)
    teacher = OnlineTeacher(model)
    assert not isinstance(teacher.head, DTensor)
    body = [parameter for parameter in model.parameters() if parameter is not model.head]
    for _ in range(2):  # nothing of it stays whole after a pass
        assert body and all(isinstance(parameter, DTensor) for parameter in body)
        assert sum(p.to_local().numel() for p in body) <= 0.6 * sum(p.numel() for p in body)
        teacher.hidden([0], torch.from_numpy(TOKENS[:1]))
    return teacher


def trained(folder: Path, how: str, rank: int, world: int) -> list[Step]:
    dtype, engine = HOW[how]
    share = Share(rank=rank, world=world, device=CPU, dtype=dtype, micro_batch=2)
    student, teacher = student_of(folder, share, engine), teacher_of(folder, share)
    return list(train(student, make_optimizer(student, RECIPE), teacher, DATA, RECIPE, share))


def _rank(rank: int, world: int, folder: Path, out: Path, which: list[str]) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(out / f"store{world}"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = {how: trained(folder, how, rank, world) for how in which}
    torch.save(
        {how: [(s.loss, s.gradient_norm, s.memory) for s in steps] for how, steps in found.items()},
        out / f"{world}-{rank}.pt",
    )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def figures(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """Loss, gradient norm and memory of every step, by how it was done, of 1 worker and each of 2."""
    out = tmp_path_factory.mktemp("workers")
    begin_group(_rank, 2, tiny_llama, out, list(HOW))
    begin_group(_rank, 1, tiny_llama, out, list(HOW))
    names = ("1-0", "2-0", "2-1")
    loaded = {name: torch.load(out / f"{name}.pt") for name in names}
    return {how: {name: np.array(loaded[name][how]) for name in names} for how in HOW}


def test_one_worker_and_two_give_the_same_losses(figures: dict[str, dict[str, np.ndarray]]) -> None:
    one, two = figures["plain"]["1-0"], figures["plain"]["2-0"]
    assert len(one) == STEPS and one[-1, 0] < 0.5 * one[0, 0]
    np.testing.assert_allclose(two[:, 0], one[:, 0], rtol=1e-4)
    np.testing.assert_allclose(two[:, 1], one[:, 1], rtol=1e-3)


def test_recomputing_activations_changes_nothing(figures: dict[str, dict[str, np.ndarray]]) -> None:
    for name in ("1-0", "2-0"):
        np.testing.assert_array_equal(figures["recomputed"][name][:, :2], figures["plain"][name][:, :2])


def test_in_bfloat16_they_differ_by_its_rounding(figures: dict[str, dict[str, np.ndarray]]) -> None:
    one, two, exact = figures["bfloat16"]["1-0"], figures["bfloat16"]["2-0"], figures["plain"]["1-0"]
    np.testing.assert_allclose(two[:, 0], one[:, 0], rtol=0.05)
    np.testing.assert_allclose(one[:, 0], exact[:, 0], rtol=0.1)
    assert not np.array_equal(one[:, 0], exact[:, 0])


def test_every_rank_knows_the_same_of_a_step(figures: dict[str, dict[str, np.ndarray]]) -> None:
    for how in HOW:
        np.testing.assert_array_equal(figures[how]["2-0"], figures[how]["2-1"])
        memory = figures[how]["2-0"][:, 2]
        assert memory[0] > 2**20 and (np.diff(memory) >= 0).all()


@pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
def test_compiled_layers_give_the_same_losses_from_one_compilation(tiny_llama: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    share, three = Share(device=CPU, dtype=torch.float32, micro_batch=5), replace(RECIPE, schedule=SHORT)
    found = {}
    for how, engine in (("plain", Engine()), ("compiled", Engine(compiled=True, recompute=True))):
        student, teacher = student_of(tiny_llama, share, engine), teacher_of(tiny_llama, share)
        found[how] = [
            s.loss for s in train(student, make_optimizer(student, three), teacher, DATA, three, share)
        ]
    assert len(found["plain"]) == 3
    np.testing.assert_allclose(found["compiled"], found["plain"], rtol=1e-4)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < frames <= 2  # four layers of one shape
