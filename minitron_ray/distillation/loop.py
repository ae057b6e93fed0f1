"""The distillation loop: the same for a trial on one core and a worker group of many nodes.

The order of the data is a function of (seed, step), the learning rate of the tokens seen: the
state is the weights, the optimizer and a step number. The global batch is fixed; workers split it,
and each goes through its share `micro_batch` sequences at a time.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron_ray.core.errors import MinitronError
from minitron_ray.data.batches import rank_slice
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.objective import Objective
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.sharding import begin_pass
from minitron_ray.distillation.state_loss import Intermediate
from minitron_ray.distillation.teacher import TeacherSignal
from minitron_ray.weights.device import on_device, peak_memory
from minitron_ray.weights.documents import predictions
from minitron_ray.weights.headless import Headless

MOST_SKIPPED: Final = 2
"""Steps in a row that may be skipped; one more ends the training."""
_NAMED: Final = 8
"""Sequences of a batch that an error names."""


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
    intermediate: Intermediate | None = None
    """Hidden states that are to agree as well; the teacher must run for them."""

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
    """Of all terms. Not finite where `skipped`, or the gradient norm is not."""
    logit_loss: float
    intermediate_loss: float | None
    """L_is before its weight; None where hidden states are not compared."""
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    """Over forward, backward and update: what the caller does between two steps does not count. On a GPU the update
    is still queued when a step ends, and is the next one's."""
    stop_requested: bool
    skipped: int = 0
    """0 where the weights were updated; else how many steps in a row, with this one, were not, because
    loss or gradient was not finite."""
    memory: int = 0
    """Most bytes that a worker's device held so far, see `peak_memory`."""


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW in float32; norms and biases are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = any(p.is_cuda for p in decayed)  # one kernel instead of some dozen passes over the state
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, fused=fused or None)


def train(
    student: Headless,
    optimizer: torch.optim.Optimizer,
    teacher: TeacherSignal | None,
    data: Data,
    recipe: Recipe,
    share: Share,
    first_step: int = 1,
    stop_requested: Callable[[], bool] = lambda: False,
    skipped: int = 0,
) -> Iterator[Step]:
    """Train from `first_step` to the recipe's last, yielding after every optimizer step.

    Every rank's `stop_requested` is asked once a step, and a yes of any reaches all of them with the loss.
    A step whose loss or gradient is not finite is skipped: weights and optimizer stay as they were, and
    its tokens count as seen. `skipped` is how many in a row were, right before `first_step`. Raises
    MinitronError at the third in a row, with what is needed to look at its batch.
    """
    objective = Objective(student, teacher, recipe.loss, recipe.intermediate, share.dtype)
    with closing(objective):
        yield from _steps(
            student, optimizer, objective, data, recipe, share, first_step, stop_requested, skipped
        )


def _steps(
    student: Headless,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    data: Data,
    recipe: Recipe,
    share: Share,
    first_step: int,
    stop_requested: Callable[[], bool],
    skipped: int,
) -> Iterator[Step]:
    student.train()
    per_step = recipe.batch * recipe.sequence_length
    for step in range(first_step, recipe.steps + 1):
        started = time.perf_counter()
        # At the middle of the step: at its end the last step would have the minimum, which may be zero.
        rate = recipe.schedule.rate(min((step - 0.5) * per_step, recipe.schedule.tokens))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = data.batch(step)
        losses = _accumulate(student, objective, data, batch, recipe, share)
        norm = nn.utils.clip_grad_norm_(student.parameters(), recipe.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        totals = _across_ranks(losses, norm, stop_requested(), share)
        if math.isfinite(totals.loss) and math.isfinite(totals.norm):
            skipped = 0
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad(set_to_none=True)
        yield Step(
            step=step,
            tokens=step * per_step,
            loss=totals.loss,
            logit_loss=totals.logits,
            intermediate_loss=totals.intermediate if recipe.intermediate is not None else None,
            gradient_norm=totals.norm,
            learning_rate=rate,
            tokens_per_second=per_step / (time.perf_counter() - started),
            stop_requested=totals.stop,
            skipped=skipped,
            memory=totals.memory,
        )
        if skipped > MOST_SKIPPED:
            raise MinitronError(_never_finite(step, skipped, totals, batch, data, recipe))


def _never_finite(
    step: int, skipped: int, totals: _Totals, batch: np.ndarray, data: Data, recipe: Recipe
) -> str:
    tokens = np.ascontiguousarray(data.sequences(batch), dtype="<i8")
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
    named = ", ".join(map(str, batch[:_NAMED].tolist()))
    more = f" and {len(batch) - _NAMED} more" if len(batch) > _NAMED else ""
    return (
        f"loss {totals.loss} and gradient norm {totals.norm} at step {step} are not finite, as in the "
        f"{skipped - 1} steps before it, none of which changed the weights; step {step} is of training "
        f"sequences {named}{more} (sha256 of their tokens {digest}); lower learning_rate (now "
        f"{recipe.schedule.peak}) or raise warmup"
    )


def _accumulate(
    student: Headless, objective: Objective, data: Data, batch: np.ndarray, recipe: Recipe, share: Share
) -> Tensor:
    """Gradients of this rank's share of `batch`; returns its part of the mean loss, of the logits' alone and
    of the hidden states', float32 (3,)."""
    mine = rank_slice(batch, share.rank, share.world)
    # Every rank makes the same number of forward passes: under FSDP each is a collective.
    largest = math.ceil(len(batch) / share.world)
    starts = range(0, largest, share.micro_batch)
    count = len(batch) * (recipe.sequence_length - 1)
    if student.separator is not None:
        # Of all ranks' sequences, which every rank must know before its first backward pass.
        count = predictions(torch.from_numpy(data.sequences(batch)), student.separator)
    totals = torch.zeros(3, device=share.device)
    for start in starts:
        begin_pass(student, share.device, last=start == starts[-1])
        indices = mine[start : start + share.micro_batch]
        weight = 1.0 if len(indices) else 0.0  # a rank without a sequence keeps step with the others
        indices = indices if len(indices) else batch[:1]
        ids = on_device(data.sequences(indices), share.device)
        terms = objective.terms(indices.tolist(), ids)
        # FSDP averages gradients over ranks; the mean over the global batch is a sum of parts.
        (terms[0] * (weight / count * share.world)).backward()
        totals += torch.stack([term.detach() for term in terms]) * (weight / count)
    return totals


@dataclass(frozen=True, slots=True, kw_only=True)
class _Totals:
    """What every rank learns of a step."""

    loss: float
    logits: float
    intermediate: float
    norm: float
    stop: bool
    memory: int


def _across_ranks(losses: Tensor, norm: Tensor, stop: bool, share: Share) -> _Totals:
    """`losses` are this rank's part of all, the logits' and the hidden states', `norm` is the same on all
    ranks. One exchange, and one wait for the device."""
    # Of a peak memory float32 would lose the last bytes, of a sum of losses the last digits.
    rest = torch.tensor([float(stop), float(peak_memory(share.device))], dtype=torch.float64)
    mine = torch.cat([losses.double(), norm.double().reshape(1), rest.to(share.device)])
    every = mine.new_empty(share.world, len(mine))
    if share.world > 1:
        dist.all_gather_into_tensor(every.view(-1), mine)  # gloo takes no output of two dimensions
    else:
        every[0] = mine
    whole, logits, states, norms, stops, peaks = every.cpu().T.tolist()
    return _Totals(
        loss=sum(whole),
        logits=sum(logits),
        intermediate=sum(states),
        norm=norms[0],
        stop=any(stops),
        memory=int(max(peaks)),
    )
