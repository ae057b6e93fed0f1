"""Forward KL divergence from the teacher's distribution: the paper's choice (§3, Tables 15 and 16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from minitron_ray.distillation.loss import DistillationLoss

if TYPE_CHECKING:
    from torch import Tensor


class ForwardKL(DistillationLoss):
    """KL(teacher || student) of the next-token distributions, summed over the vocabulary."""

    kind: Literal["forward_kl"] = "forward_kl"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both models' logits; the value is not rescaled (1.0 was best in the paper)."""

    needs_teacher: ClassVar[bool] = True

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        student, teacher = self.divided(student, teacher, self.temperature)
        log_student = student.log_softmax(-1)
        log_teacher = teacher.log_softmax(-1)
        probabilities = log_teacher.exp()
        value = (probabilities * log_teacher.sub_(log_student)).sum(-1)
        gradient = log_student.exp_().sub_(probabilities)
        return value, gradient if self.temperature == 1.0 else gradient.div_(self.temperature)
