"""The distillation loop: the same for a trial on one core and a worker group of many nodes.

The order of the data is a function of (seed, step), the learning rate of the tokens seen: the
state is the weights, the optimizer and a step number. The global batch is fixed; workers split it,
and each goes through its share `micro_batch` sequences at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron_ray.core.errors import MinitronError
from minitron_ray.data.batches import rank_slice
from minitron_ray.distillation.fused_head import fused_head_loss
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.targets import SparseTargets
from minitron_ray.distillation.teacher import TeacherSignal
from minitron_ray.weights.device import autocast
from minitron_ray.weights.headless import Headless


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train: everything that decides the numbers, apart from student, teacher and data."""

    loss: DistillationLoss
    schedule: Schedule
    batch: int
    """Sequences an optimizer step, over all workers."""
    sequence_length: int
    weight_decay: float
    betas: tuple[float, float]
    clip: float

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one may go past the token count by less than one batch."""
        return math.ceil(self.schedule.tokens / (self.batch * self.sequence_length))


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """`batch(step)` names the sequences of a step (from 1); `sequences(indices)` gives int64 (n, tokens)."""

    batch: Callable[[int], np.ndarray]
    sequences: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of the work is this process's. `dtype` is the one of matrix products."""

    rank: int = 0
    world: int = 1
    device: torch.device
    dtype: torch.dtype
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step, the same on every rank. `step` counts from 1, `tokens` over all workers."""

    step: int
    tokens: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    stop_requested: bool


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW in float32; norms and biases are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas)


def train(
    student: Headless,
    optimizer: torch.optim.Optimizer,
    teacher: TeacherSignal | None,
    data: Data,
    recipe: Recipe,
    share: Share,
    first_step: int = 1,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Train from `first_step` to the recipe's last, yielding after every optimizer step.

    Rank 0's `stop_requested` is asked once a step and its answer reaches every rank with the loss.
    Raises MinitronError when loss or gradient is not finite.
    """
    student.train()
    per_step = recipe.batch * recipe.sequence_length
    for step in range(first_step, recipe.steps + 1):
        started = time.perf_counter()
        # At the middle of the step: at its end the last step would have the minimum, which may be zero.
        rate = recipe.schedule.rate(min((step - 0.5) * per_step, recipe.schedule.tokens))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _accumulate(student, teacher, data, data.batch(step), recipe, share)
        norm = nn.utils.clip_grad_norm_(student.parameters(), recipe.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        total, stop = _across_ranks(loss, stop_requested(), share)
        if not (math.isfinite(total) and math.isfinite(float(norm))):
            raise MinitronError(
                f"loss {total} and gradient norm {float(norm)} at step {step} are not finite; "
                f"lower learning_rate (now {recipe.schedule.peak}) or raise warmup"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Step(
            step=step,
            tokens=step * per_step,
            loss=total,
            gradient_norm=float(norm),
            learning_rate=rate,
            tokens_per_second=per_step / (time.perf_counter() - started),
            stop_requested=stop,
        )


def _accumulate(
    student: Headless,
    teacher: TeacherSignal | None,
    data: Data,
    batch: np.ndarray,
    recipe: Recipe,
    share: Share,
) -> Tensor:
    """Gradients of this rank's share of `batch`; returns its part of the mean loss, float32 scalar."""
    mine = rank_slice(batch, share.rank, share.world)
    # Every rank makes the same number of forward passes: under FSDP each is a collective.
    largest = math.ceil(len(batch) / share.world)
    starts = range(0, largest, share.micro_batch)
    predictions = len(batch) * (recipe.sequence_length - 1)
    total = torch.zeros((), device=share.device)
    sync = getattr(student, "set_requires_gradient_sync", None)
    for start in starts:
        if sync is not None:
            sync(start == starts[-1])
        indices = mine[start : start + share.micro_batch]
        weight = 1.0 if len(indices) else 0.0  # a rank without a sequence keeps step with the others
        indices = indices if len(indices) else batch[:1]
        ids = torch.from_numpy(data.sequences(indices)).to(share.device)
        targets = teacher.targets(indices.tolist(), ids) if teacher and recipe.loss.needs_teacher else None
        use = partial(
            fused_head_loss,
            input_ids=ids,
            loss=recipe.loss,
            dtype=share.dtype,
            teacher_hidden=targets if isinstance(targets, Tensor) else None,
            teacher_head=teacher.head if teacher and isinstance(targets, Tensor) else None,
            sparse=targets if isinstance(targets, SparseTargets) else None,
            softcap=student.softcap,
            teacher_softcap=teacher.softcap if teacher else None,
        )
        with autocast(share.device, share.dtype):
            loss = student(ids, use) * (weight / predictions)
        # FSDP averages gradients over ranks; the mean over the global batch is a sum of parts.
        (loss * share.world).backward()
        total += loss.detach()
    return total


def _across_ranks(loss: Tensor, stop: bool, share: Share) -> tuple[float, bool]:
    message = torch.stack([loss, loss.new_tensor(float(stop))])
    if share.world > 1:
        dist.all_reduce(message)
    total, stops = message.tolist()
    return total, stops > 0
