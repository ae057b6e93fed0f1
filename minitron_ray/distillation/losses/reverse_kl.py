"""Reverse KL divergence, from the student's distribution (paper §3, Tables 15 and 16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from minitron_ray.distillation.loss import DistillationLoss, by_logits

if TYPE_CHECKING:
    from torch import Tensor


class ReverseKL(DistillationLoss):
    """KL(student || teacher) of the next-token distributions, summed over the vocabulary.

    It asks the student to leave out what the teacher leaves out, not to cover all that it holds likely.
    """

    kind: Literal["reverse_kl"] = "reverse_kl"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both models' logits; the value is not rescaled."""

    needs_teacher: ClassVar[bool] = True

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        student, teacher = self.divided(student, teacher, self.temperature)
        log_student = student.log_softmax(-1)
        probabilities = log_student.exp()
        # By the student's probabilities: log(student / teacher) + 1.
        gradient = log_student.sub_(teacher.log_softmax(-1))
        value = (probabilities * gradient).sum(-1)
        return value, by_logits(probabilities, gradient, self.temperature)
