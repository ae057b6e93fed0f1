"""The LM head and the loss in one step, forward and backward, a chunk of tokens at a time.

The gradients are formed in the forward pass: the plain computation's four matrix products, and
never a (tokens x vocabulary) matrix of either model. (Recomputing the projections in the backward
pass instead would cost two products more.) Two buffers of a chunk's logits are used again and again;
on a CPU the loss goes through them a few rows at a time, which stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.targets import SparseTargets
from minitron_ray.weights.vocabulary import capped, common_rows, project, row_slices

_CHUNK: Final = {"cpu": 2**23, "cuda": 2**27}
"""Logits of one model held at once: 32 MiB in float32 on a CPU, 512 MiB on a GPU."""


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """All arguments are those of `_Pass`."""
        head_pass = _Pass(hidden, head, *rest)
        with torch.autocast(hidden.device.type, enabled=False):
            values, gradients = head_pass.run(ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        ctx.gradients, ctx.dtypes = gradients, (hidden.dtype, head.dtype)
        ctx.mark_non_differentiable(values)
        return values.sum(), values

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused head's gradients are gone: its backward pass can run once")
        (states, weight), ctx.gradients = ctx.gradients, None
        hidden_dtype, head_dtype = ctx.dtypes
        # In place: nobody else has them, and the head's is the largest tensor of all.
        return (states.mul_(outer[0]).to(hidden_dtype), weight.mul_(outer[0]).to(head_dtype), *(None,) * 8)


class _Pass:
    """One forward pass over all tokens, (tokens, ...) each."""

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        sparse: SparseTargets | None,
        labels: Tensor,
        loss: DistillationLoss,
        dtype: torch.dtype,
        softcap: float | None,
        teacher_softcap: float | None,
    ) -> None:
        self._softcap, self._teacher_softcap = softcap, teacher_softcap
        self._states, self._head = hidden.to(dtype), head.to(dtype)
        self._sparse, self._labels, self._loss = sparse, labels, loss
        self._teacher_states, self._teacher_head = None, None
        if sparse is None and loss.needs_teacher and teacher_hidden is not None and teacher_head is not None:
            self._teacher_states, self._teacher_head = teacher_hidden, teacher_head.to(dtype)
        size = _CHUNK.get(hidden.device.type, _CHUNK["cpu"]) // len(head)
        self._chunk = max(1, min(len(hidden), max(64, size)))

    def run(self, training: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Each token's loss, float32, and the gradients of their sum by hidden states and head, float32."""
        states, head = self._states, self._head
        count, size = len(states), (self._chunk, len(head))
        logits = torch.empty(size, dtype=torch.float32, device=states.device)
        others = torch.empty_like(logits) if self._teacher_states is not None else None
        values = torch.empty(count, dtype=torch.float32, device=states.device)
        if training:
            by_states = torch.empty(states.shape, dtype=torch.float32, device=states.device)
            by_head = torch.empty(head.shape, dtype=torch.float32, device=states.device)
        for start in range(0, count, self._chunk):
            part = slice(start, min(start + self._chunk, count))
            own = project(states[part], head, logits[: part.stop - start])
            theirs = None
            if others is not None and self._teacher_states is not None and self._teacher_head is not None:
                their_states = self._teacher_states[part].to(head.dtype)
                theirs = project(their_states, self._teacher_head, others[: len(own)])
            for rows in row_slices(len(own), len(head), own.device):
                at = slice(start + rows.start, start + rows.stop)
                values[at] = self._loss_of(own[rows], None if theirs is None else theirs[rows], at, training)
            if training:
                gradient = own.to(head.dtype)
                _product(by_states[part], gradient, head, add=False)
                _product(by_head, gradient.T, states[part], add=start > 0)
        if not training:
            return values, None
        return values, (by_states, by_head if count else by_head.zero_())

    def _loss_of(self, raw: Tensor, teacher: Tensor | None, at: slice, training: bool) -> Tensor:
        """The loss of some rows, whose gradient by the raw logits takes their place."""
        logits = capped(raw, self._softcap)
        slope = None if self._softcap is None or not training else 1 - (logits / self._softcap) ** 2
        labels = self._labels[at]
        if self._sparse is not None:
            values, gradient = self._loss.sparse_value_and_gradient(logits, self._sparse.part(at), labels)
        else:
            others = None if teacher is None else capped(teacher, self._teacher_softcap)
            values, gradient = self._loss.value_and_gradient(logits, others, labels)
        if training:
            raw.copy_(gradient if slope is None else gradient * slope)
        return values


def _product(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """left · right into `out`, or added to it, which is float32."""
    if left.dtype != out.dtype:
        product = left @ right
        _ = out.add_(product) if add else out.copy_(product)
    elif add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def fused_head_loss(*arguments: Any, **named: Any) -> Tensor:
    """`fused_head_losses` without what each sequence has of it."""
    return fused_head_losses(*arguments, **named)[0]


def fused_head_losses(
    hidden: Tensor,
    head: Tensor,
    input_ids: Tensor,
    loss: DistillationLoss,
    dtype: torch.dtype,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    sparse: SparseTargets | None = None,
    vocabulary: int | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss summed over the predictions of a batch, float32 scalar, differentiable by `hidden` and `head`
    once; and that of each sequence, float32 (samples,), which is not.

    `hidden` (samples, tokens, hidden) and `head` (vocabulary, hidden) are the student's,
    `teacher_hidden` and `teacher_head` the teacher's (another hidden size, the same vocabulary). Of heads
    that are padded to unlike numbers of rows the first `vocabulary` count, None for all: the others have
    no logits and no gradient.
    Each sequence of T tokens has T - 1 predictions, of which `counted`, bool (samples, T - 1), names those
    that have a loss; None for all. The soft caps are of either model's logits.
    `sparse` stands for the teacher in place of `teacher_hidden`: (samples, tokens - 1, slots).
    """
    head, teacher_head = common_rows(head, vocabulary), common_rows(teacher_head, vocabulary)
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    flat_teacher = None
    if teacher_hidden is not None:
        flat_teacher = teacher_hidden[:, :-1].reshape(-1, teacher_hidden.shape[-1])
    flat_sparse = None if sparse is None else sparse.flat()
    labels = input_ids[:, 1:].reshape(-1)
    if counted is not None:
        chosen = counted.reshape(-1)
        flat, labels = flat[chosen], labels[chosen]
        flat_teacher = None if flat_teacher is None else flat_teacher[chosen]
        flat_sparse = None if flat_sparse is None else flat_sparse.part(chosen)
    total, values = _FusedHead.apply(
        flat,
        head,
        flat_teacher,
        teacher_head,
        flat_sparse,
        labels,
        loss,
        dtype,
        softcap,
        teacher_softcap,
    )
    if counted is not None:
        values = values.new_zeros(counted.shape).masked_scatter_(counted, values)
    return total, values.view(len(hidden), -1).sum(-1)
