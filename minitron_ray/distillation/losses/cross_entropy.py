"""Cross entropy on the next token: conventional training, without a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from minitron_ray.distillation.loss import DistillationLoss

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(DistillationLoss):
    """Negative log-likelihood of the next token."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    needs_teacher: ClassVar[bool] = False

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        log_student = student.log_softmax(-1)
        index = labels[:, None]
        value = -log_student.gather(-1, index)[:, 0]
        gradient = log_student.exp_()
        gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -1.0))
        return value, gradient
