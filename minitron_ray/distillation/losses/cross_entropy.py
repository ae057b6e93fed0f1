"""Cross entropy on the next token: conventional training, without a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.weights.softmax import distribution

if TYPE_CHECKING:
    from torch import Tensor

    from minitron_ray.distillation.targets import SparseTargets


class CrossEntropy(DistillationLoss):
    """Negative log-likelihood of the next token."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    needs_teacher: ClassVar[bool] = False

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient, log_sum = distribution(student)
        index = labels[:, None]
        value = (log_sum - student.gather(-1, index)[:, 0]).to(student.dtype)
        gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -1.0))
        return value, gradient

    @property
    def refuses_sparse(self) -> None:
        """It takes nothing of the teacher."""
        return None

    def sparse_value_and_gradient(
        self, student: Tensor, targets: SparseTargets, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.value_and_gradient(student, None, labels)
