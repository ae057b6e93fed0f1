"""Validation loss and divergence from the teacher: the same code for teacher, cut and student."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from minitron_ray.weights.device import autocast
from minitron_ray.weights.documents import predicted
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.vocabulary import sequence_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Of each sequence, nats a token, float64 (sequences,): cross entropy, and KL(teacher || subject).

    Their means give every sequence the same weight, also where documents that begin in it leave it with a
    few predictions less than another.
    """

    losses: NDArray
    divergences: NDArray | None

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def divergence(self) -> float | None:
        return None if self.divergences is None else float(self.divergences.mean())

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def stderr(self) -> float:
        """Standard error of the loss over sequences; NaN for a single one."""
        return _standard_error(self.losses)

    @property
    def divergence_stderr(self) -> float | None:
        return None if self.divergences is None else _standard_error(self.divergences)


def _standard_error(values: NDArray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def measure(
    subject: Headless | None,
    sequences: NDArray,
    indices: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    teacher_hidden: Callable[[Sequence[int], Tensor], Tensor] | None = None,
    teacher_head: Tensor | None = None,
    teacher_softcap: float | None = None,
    vocabulary: int | None = None,
    separator: int | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], None] = lambda sequences: None,
) -> Measurement:
    """Measure `subject` on `sequences`, int64 (n, tokens), named `indices` to the teacher; where it is
    None, the teacher itself by what it gives for `teacher_hidden`. Distributions are over the first
    `vocabulary` rows of the LM heads, None for all. `separator` is what `subject` and teacher have.

    With `world` > 1 every rank must call; each takes its share, and all get the whole result.
    """
    was_training = subject is not None and subject.training
    if subject is not None:
        subject.eval()
    share = -(-len(sequences) // world)
    result = torch.zeros(2, len(sequences), dtype=torch.float64)
    first = min(rank * share, len(sequences))
    last = min(first + share, len(sequences))
    for offset in range(
        0, share, batch
    ):  # as many forward passes on every rank: under FSDP they are collectives
        start, stop = first + offset, min(first + offset + batch, last)
        rows = range(start, stop) if start < stop else range(1)
        ids = torch.from_numpy(np.ascontiguousarray(sequences[rows.start : rows.stop])).to(device)
        hidden = None
        if teacher_hidden is not None:
            hidden = teacher_hidden([int(i) for i in indices[rows.start : rows.stop]], ids)
        # The teacher does not diverge from itself: that needs no second projection and softmax.
        use = partial(
            sequence_scores,
            input_ids=ids,
            teacher_hidden=None if subject is None else hidden,
            teacher_head=None if subject is None else teacher_head,
            dtype=dtype,
            softcap=teacher_softcap if subject is None else subject.softcap,
            teacher_softcap=teacher_softcap,
            vocabulary=vocabulary,
            counted=predicted(ids, separator),
        )
        with torch.no_grad(), autocast(device, dtype):
            if subject is None:
                assert hidden is not None and teacher_head is not None
                losses, divergences = use(hidden, teacher_head)
            else:
                losses, divergences = subject(ids, use)
        if start < stop:
            result[0, start:stop] = losses
            if divergences is not None:
                result[1, start:stop] = divergences
        progress(min(offset + batch, share) * world)
    if world > 1:
        shared = result.to(device)
        dist.all_reduce(shared)
        result = shared.cpu()
    if subject is not None:
        subject.train(was_training)
    return Measurement(
        losses=result[0].numpy(), divergences=None if teacher_hidden is None else result[1].numpy()
    )
