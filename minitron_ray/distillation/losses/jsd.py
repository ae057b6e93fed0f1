"""Generalised Jensen-Shannon divergence: bounded, between the two KL divergences (Agarwal et al., GKD)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from minitron_ray.distillation.loss import DistillationLoss, by_logits

if TYPE_CHECKING:
    from torch import Tensor


class JSD(DistillationLoss):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student.

    Over beta it tends to the forward KL divergence for small beta, over 1 - beta to the reverse one
    for beta near 1. At 0.5 it is the Jensen-Shannon divergence, at most ln 2.
    """

    kind: Literal["jsd"] = "jsd"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both models' logits; the value is not rescaled."""

    needs_teacher: ClassVar[bool] = True

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        student, teacher = self.divided(student, teacher, self.temperature)
        log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        log_mean = (log_student + math.log1p(-self.beta)).logaddexp(log_teacher + math.log(self.beta))
        probabilities = log_student.exp()
        value = (log_teacher.exp() * log_teacher.sub_(log_mean)).sum(-1).mul_(self.beta)
        # By the student's probabilities: what m moves cancels, (1 - beta) log(student / m) is left.
        gradient = log_student.sub_(log_mean).mul_(1 - self.beta)
        value += (probabilities * gradient).sum(-1)
        return value, by_logits(probabilities, gradient, self.temperature)
