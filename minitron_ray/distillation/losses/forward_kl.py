"""Forward KL divergence from the teacher's distribution: the paper's choice (§3, Tables 15 and 16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.weights.softmax import distribution

if TYPE_CHECKING:
    from torch import Tensor

    from minitron_ray.distillation.targets import SparseTargets


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
        gradient, student_sum = distribution(student)
        probabilities, teacher_sum = distribution(teacher)
        # Of log p - log q the logarithms of the sums leave the mean over p.
        value = teacher.sub_(student).mul_(probabilities).sum(-1).add_(student_sum - teacher_sum)
        gradient.sub_(probabilities)
        return value, gradient if self.temperature == 1.0 else gradient.div_(self.temperature)

    @property
    def refuses_sparse(self) -> str | None:
        """A few probabilities at temperature 1 do not tell those at another."""
        return None if self.temperature == 1.0 else f"has temperature {self.temperature:g}"

    def sparse_value_and_gradient(
        self, student: Tensor, targets: SparseTargets, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sampled targets: exact divergence and gradient in the mean over draws. With a tail: the
        divergence of the distributions over the ids and one more outcome, "any other"."""
        if self.refuses_sparse is not None:
            raise ValueError(f"{self.kind} {self.refuses_sparse}")
        ids, probabilities = targets.ids, targets.probabilities
        gradient, log_sum = distribution(student)
        value = (probabilities * (log_sum[:, None] - student.gather(-1, ids))).sum(-1).to(student.dtype)
        # xlogy(p, p) is p log p, and 0 at 0.
        own = targets.entropy
        value += probabilities.xlogy(probabilities).sum(-1) if own is None else -own
        if targets.tail is not None:
            value += _tail(gradient, ids, targets.tail)
        return value, gradient.scatter_add_(-1, ids, -probabilities)


def _tail(student: Tensor, ids: Tensor, tail: Tensor) -> Tensor:
    """The tail's part of the divergence; what it takes off the gradient is taken off `student`, which
    has the student's probabilities (tokens, vocabulary), at all ids but those of `ids`."""
    kept = student.gather(-1, ids)
    # Summed and not 1 - kept, which would cancel.
    rest = student.scatter_(-1, ids, 0.0).sum(-1).clamp_min_(1e-37)
    student.mul_((1 - tail / rest)[:, None]).scatter_(-1, ids, kept)
    return tail.xlogy(tail / rest)
