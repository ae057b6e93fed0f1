"""`Objective`: what a micro-batch is trained on, the logits' loss and the hidden states beside it.

L = L_logits + alpha · L_is (paper §3). Modules are listened to with hooks that are set once, before the first
pass; the layers that they are in are not compiled (`sharding.prepare_layer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from minitron_ray.distillation.fused_head import fused_head_losses
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.state_loss import Intermediate
from minitron_ray.distillation.targets import SparseTargets
from minitron_ray.distillation.teacher import OnlineTeacher, TeacherSignal
from minitron_ray.weights.device import autocast
from minitron_ray.weights.documents import predicted
from minitron_ray.weights.headless import Headless

Terms = tuple[Tensor, Tensor, Tensor]
"""A tuple and no class of its own: sharded models look for tensors in what their forward pass returns."""


class Objective:
    """The loss of a student under one teacher. Raises ValueError where hidden states are asked of a teacher
    that does not run."""

    def __init__(
        self,
        student: Headless,
        teacher: TeacherSignal | None,
        loss: DistillationLoss,
        intermediate: Intermediate | None,
        dtype: torch.dtype,
    ) -> None:
        self._student, self._teacher, self._loss, self._dtype = student, teacher, loss, dtype
        self._intermediate, self._ears = intermediate, (_Ears(), _Ears())
        if intermediate is not None:
            if not isinstance(teacher, OnlineTeacher):
                raise ValueError("intermediate states need the running teacher")
            self._ears = (
                _Ears(teacher.model.model, [pair.teacher for pair in intermediate.pairs]),
                _Ears(student.model, [pair.student for pair in intermediate.pairs]),
            )

    def terms(self, indices: Sequence[int], input_ids: Tensor) -> Terms:
        """Loss, that of the logits alone, and that of the hidden states before its weight: float32 scalars,
        summed over the predictions of the sequences. The first is differentiable. 0 for no hidden states."""
        counted = predicted(input_ids, self._student.separator)
        above, below = self._ears
        with above.open() as heard_above, below.open() as heard_below:
            targets = None
            if self._teacher is not None and (self._loss.needs_teacher or self._intermediate is not None):
                targets = self._teacher.targets(indices, input_ids)
            head_loss = partial(
                fused_head_losses,
                input_ids=input_ids,
                loss=self._loss,
                dtype=self._dtype,
                teacher_hidden=targets if isinstance(targets, Tensor) else None,
                teacher_head=self._teacher.head if self._teacher and isinstance(targets, Tensor) else None,
                sparse=targets if isinstance(targets, SparseTargets) else None,
                softcap=self._student.softcap,
                teacher_softcap=self._teacher.softcap if self._teacher else None,
                vocabulary=len(self._teacher.head) if self._teacher else None,
                counted=counted,
            )

            def use(hidden: Tensor, head: Tensor) -> Terms:
                total, each = head_loss(hidden, head)
                if self._intermediate is None:
                    return total, each.sum(), each.new_zeros(())
                states = self._states(heard_above, heard_below, counted)
                weight = self._intermediate.weight
                # A student that agrees already has nothing to learn here.
                alpha = (
                    each.clamp_min(0) / states.detach() if weight is None else torch.full_like(each, weight)
                )
                alpha = torch.where(states.detach() > 0, alpha, 0.0)
                return total + (alpha * states).sum(), each.sum(), states.detach().sum()

            with autocast(input_ids.device, self._dtype):
                return self._student(input_ids, use)

    def _states(self, above: dict[str, Tensor], below: dict[str, Tensor], counted: Tensor | None) -> Tensor:
        """L_is of each sequence, summed over pairs and predictions, float32 (samples,)."""
        assert self._intermediate is not None
        lift: Callable[[Tensor], Tensor] = self._student.projection or nn.Identity()
        total: Tensor | None = None
        for pair in self._intermediate.pairs:
            # The last position predicts nothing.
            own, others = lift(below[pair.student][:, :-1]), above[pair.teacher][:, :-1]
            with torch.autocast(own.device.type, enabled=False):
                values = pair.value(own, others)
                value = (values if counted is None else values * counted).sum(-1)
            total = value if total is None else total + value
        assert total is not None
        return total

    def close(self) -> None:
        """Stop listening."""
        for ears in self._ears:
            ears.close()


class _Ears:
    """Hooks on modules, which hear while they are open: neither in measurements nor when a layer is computed
    again for its backward pass."""

    def __init__(self, model: nn.Module | None = None, paths: Sequence[str] = ()) -> None:
        self._heard: dict[str, Tensor] = {}
        self._listens = False
        self._hooks = [
            model.get_submodule(path).register_forward_hook(partial(self._hear, path))
            for path in dict.fromkeys(paths)
            if model is not None
        ]

    @contextmanager
    def open(self) -> Iterator[dict[str, Tensor]]:
        """What was heard, by path, until the context ends."""
        self._listens = True
        try:
            yield self._heard
        finally:
            self._listens = False
            self._heard.clear()

    def _hear(self, path: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        if self._listens:
            self._heard[path] = output

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
