"""The LM head and the loss in one step, forward and backward, a chunk of tokens at a time.

The gradients are formed in the forward pass: the plain computation's four matrix products, and
never a (tokens x vocabulary) matrix of either model. (Recomputing the projections in the backward
pass instead would cost two products more.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.targets import SparseTargets
from minitron_ray.weights.vocabulary import capped, chunks


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> Tensor:
        training = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        states, weight = hidden.to(dtype), head.to(dtype)
        teacher_weight = None if teacher_head is None else teacher_head.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        states_gradient = torch.empty_like(hidden, dtype=torch.float32) if training else None
        weight_gradient = torch.zeros_like(head, dtype=torch.float32) if training else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in chunks(len(states), len(weight), states.device):
                logits = capped((states[part] @ weight.T).float(), softcap)
                # The loss may overwrite the logits.
                slope = None if softcap is None or not training else 1 - (logits / softcap) ** 2
                if sparse is not None:
                    values, gradient = loss.sparse_value_and_gradient(logits, sparse.part(part), labels[part])
                else:
                    teacher_logits = None
                    if loss.needs_teacher and teacher_hidden is not None and teacher_weight is not None:
                        raw = (teacher_hidden[part].to(dtype) @ teacher_weight.T).float()
                        teacher_logits = capped(raw, teacher_softcap)
                    values, gradient = loss.value_and_gradient(logits, teacher_logits, labels[part])
                total += values.sum()
                if states_gradient is not None and weight_gradient is not None:
                    gradient = (gradient if slope is None else gradient * slope).to(dtype)
                    states_gradient[part] = gradient @ weight
                    weight_gradient += gradient.T @ states[part]
        if training:
            ctx.save_for_backward(states_gradient, weight_gradient)
            ctx.dtypes = hidden.dtype, head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        states_gradient, weight_gradient = ctx.saved_tensors
        hidden_dtype, head_dtype = ctx.dtypes
        scale = outer[0]
        return (
            (states_gradient * scale).to(hidden_dtype),
            (weight_gradient * scale).to(head_dtype),
            *(None,) * 8,
        )


def fused_head_loss(
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
) -> Tensor:
    """The loss summed over the predictions of a batch, float32 scalar; differentiable by `hidden` and `head`.

    `hidden` (samples, tokens, hidden) and `head` (vocabulary, hidden) are the student's,
    `teacher_hidden` and `teacher_head` the teacher's (another hidden size, the same vocabulary).
    Each sequence of T tokens has T - 1 predictions. The soft caps are of either model's logits.
    `sparse` stands for the teacher in place of `teacher_hidden`: (samples, tokens - 1, slots).
    """
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    flat_teacher = None
    if teacher_hidden is not None:
        flat_teacher = teacher_hidden[:, :-1].reshape(-1, teacher_hidden.shape[-1])
    labels = input_ids[:, 1:].reshape(-1)
    return _FusedHead.apply(
        flat,
        head,
        flat_teacher,
        teacher_head,
        None if sparse is None else sparse.flat(),
        labels,
        loss,
        dtype,
        softcap,
        teacher_softcap,
    )
