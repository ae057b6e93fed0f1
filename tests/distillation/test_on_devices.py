"""The same on a GPU as on the CPU: the head's loss, the sharded loop, checkpoints, the stored teacher.

Every body runs on the CPU, too, which proves it where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from minitron_ray.distillation.checkpoints import Checkpoints
from minitron_ray.distillation.fused_head import fused_head_loss
from minitron_ray.distillation.loop import Share, Step, make_optimizer, train
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.sharding import Sharding
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.teacher import (
    OnlineTeacher,
    SignalBlock,
    StoredTeacher,
    compute_block,
    write_signal,
)
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build
from tests.distillation.test_workers import BATCH, DATA, LENGTH, RECIPE, TOKENS, damaged

FEW = replace(RECIPE, schedule=replace(RECIPE.schedule, tokens=8 * BATCH * LENGTH))
SAVED = 3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def group(device: torch.device) -> Iterator[None]:
    """This process alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def student(folder: Path, device: torch.device) -> Headless:
    config = Checkpoint(folder).config
    return Headless(build(config, damaged(folder), dtype=torch.float32, device=device, trainable=True))


def teacher(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Headless:
    checkpoint = Checkpoint(folder)
    return Headless(build(checkpoint.config, checkpoint, dtype=dtype, device=device).eval())


def share(device: torch.device, dtype: torch.dtype = torch.float32) -> Share:
    return Share(device=device, dtype=dtype, micro_batch=2)


def losses(steps: Iterator[Step]) -> list[float]:
    return [step.loss for step in steps]


# --- The head's loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_heads_loss_is_the_plain_one(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    """Value and gradients, against the divergence by torch in float64 of the same numbers."""
    source = torch.Generator().manual_seed(0)

    def numbers(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=source).to(dtype).float()  # exact in either type

    hidden, head = numbers(3, 17, 8), numbers(50, 8)
    ids, teachers, teachers_head = torch.randint(0, 50, (3, 17)), numbers(3, 17, 12), numbers(50, 12)
    ours = [value.to(device, copy=True).requires_grad_() for value in (hidden, head)]
    loss = fused_head_loss(
        ours[0],
        ours[1],
        ids.to(device),
        ForwardKL(),
        dtype,
        teacher_hidden=teachers.to(device, dtype),
        teacher_head=teachers_head.to(device, dtype),
    )
    loss.backward()
    plain = [value.double().requires_grad_() for value in (hidden, head)]
    expected = F.kl_div(
        (plain[0] @ plain[1].T)[:, :-1].log_softmax(-1),
        (teachers.double() @ teachers_head.double().T)[:, :-1].log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert mine.grad.device == ours[0].device
        difference = (mine.grad.double().cpu() - theirs.grad).norm() / theirs.grad.norm()
        assert difference < tolerance


# --- The loop -------------------------------------------------------------------------------------------


def shard(model: Headless, device: torch.device, dtype: torch.dtype) -> None:
    layers = list(model.model.get_submodule("model.layers").children())
    if dtype != torch.float32:
        return Sharding(1, device, dtype).whole(model, layers)
    mesh = init_device_mesh(device.type, (1,))  # `Sharding` leaves one rank in float32 as it is
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_sharded_student_has_the_plain_ones_losses(
    tiny_llama: Path, device: torch.device, group: None, dtype: torch.dtype, tolerance: float
) -> None:
    found = []
    for sharded in (False, True):
        model = student(tiny_llama, device)
        if sharded:
            shard(model, device, dtype)
        assert isinstance(model, FSDPModule) == sharded
        online = OnlineTeacher(teacher(tiny_llama, device, dtype))
        found.append(
            losses(train(model, make_optimizer(model, FEW), online, DATA, FEW, share(device, dtype)))
        )
    plain, other = found
    assert len(plain) == 8 and np.isfinite(plain).all() and min(plain) < 0.95 * plain[0]
    np.testing.assert_allclose(other, plain, rtol=tolerance)


# --- Checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_is_of_its_step_while_training_goes_on(
    tiny_llama: Path, tmp_path: Path, device: torch.device, group: None, asynchronous: bool
) -> None:
    """Weights and optimizer come back as they were then, to the bit, and lead to the same losses."""
    online, model = OnlineTeacher(teacher(tiny_llama, device)), student(tiny_llama, device)
    optimizer = make_optimizer(model, FEW)
    checkpoints = Checkpoints(tmp_path, 0, device, asynchronous=asynchronous)
    whole, then = [], {}
    for step in train(model, optimizer, online, DATA, FEW, share(device)):
        whole.append(step.loss)
        if step.step == SAVED:
            then = state(model, optimizer)
            checkpoints.save(step.step, model, optimizer)
    checkpoints.finish()
    again = student(tiny_llama, device)
    resumed = make_optimizer(again, FEW)
    assert checkpoints.latest() == SAVED
    checkpoints.load(SAVED, again, resumed)
    loaded = state(again, resumed)
    assert then.keys() == loaded.keys() and len(then) > 3 * 10
    assert all(torch.equal(loaded[name], value) for name, value in then.items())
    rest = losses(train(again, resumed, online, DATA, FEW, share(device), first_step=SAVED + 1))
    checkpoints.wait()
    checkpoints.close()
    if device.type == "cpu":
        assert rest == whole[SAVED:]
    else:  # where sums are made in no fixed order
        np.testing.assert_allclose(rest, whole[SAVED:], rtol=1e-5)


def test_a_checkpoint_before_the_first_update_is_no_update(
    tiny_llama: Path, tmp_path: Path, device: torch.device, group: None
) -> None:
    """As where the first step was skipped, and a stop came in it."""
    online, found = OnlineTeacher(teacher(tiny_llama, device)), {}
    for saved in (False, True):
        model = student(tiny_llama, device)
        optimizer = make_optimizer(model, FEW)
        if saved:
            checkpoints = Checkpoints(tmp_path, 0, device, asynchronous=False)
            checkpoints.save(1, model, optimizer)
            checkpoints.finish()
            again = student(tiny_llama, device)
            resumed = make_optimizer(again, FEW)
            checkpoints.load(1, again, resumed)
            checkpoints.close()
            found["resumed"] = losses(train(again, resumed, online, DATA, FEW, share(device), first_step=2))
        steps = train(model, optimizer, online, DATA, FEW, share(device), first_step=2)
        found["saved" if saved else "left alone"] = losses(steps)
    for how in ("saved", "resumed"):
        np.testing.assert_allclose(found[how], found["left alone"], rtol=0 if device.type == "cpu" else 1e-5)


def state(model: Headless, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all there is, on the CPU."""
    found = {name: value.detach().cpu().clone() for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value.detach().cpu().clone()
    return found


@pytest.mark.gpu
def test_writing_does_not_wait_for_training_that_is_queued(tiny_llama: Path, tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = student(tiny_llama, device)
        optimizer = make_optimizer(model, FEW)
        next(train(model, optimizer, OnlineTeacher(teacher(tiny_llama, device)), DATA, FEW, share(device)))
        checkpoints = Checkpoints(tmp_path, 0, device, asynchronous=True)
        checkpoints.save(1, model, optimizer)
        torch.cuda._sleep(2**35)  # some twenty seconds
        queued = torch.cuda.Event()
        queued.record()
        checkpoints.finish()
        assert not queued.query()
        checkpoints.close()
    finally:
        dist.destroy_process_group()


# --- The stored teacher ---------------------------------------------------------------------------------


def test_final_hidden_states_come_back_as_they_were(
    tiny_llama: Path, tmp_path: Path, device: torch.device
) -> None:
    model, numbers = teacher(tiny_llama, device, torch.bfloat16), [4, 11, 7]
    block = SignalBlock(folder=tmp_path, signal=FinalHidden(), sequences=numbers)
    compute_block(block, tmp_path, model, TOKENS.__getitem__, dtype=torch.bfloat16, batch=3, seed=0)
    write_signal(tmp_path, [block])
    ids = torch.from_numpy(TOKENS[numbers]).to(device)
    found = StoredTeacher(tmp_path, model.head.detach()).hidden(numbers, ids)
    assert found.dtype == torch.bfloat16 and found.device == ids.device
    assert torch.equal(found, OnlineTeacher(model).hidden(numbers, ids))
