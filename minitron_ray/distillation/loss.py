"""`DistillationLoss`: what a file of `losses/` provides."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from minitron_ray.core.kinds import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from minitron_ray.distillation.targets import SparseTargets


class DistillationLoss(Plugin):
    """A loss per token on logits, with its gradient in closed form.

    The gradient is formed together with the value, chunk by chunk, so that no
    (tokens x vocabulary) matrix outlives its chunk (see `vocabulary.py`).
    """

    @property
    @abstractmethod
    def needs_teacher(self) -> bool:
        """Whether the teacher's logits are used; a class variable where it does not depend on the fields."""

    @abstractmethod
    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of each token, float32 (tokens,), and its gradient by the student's logits, (tokens, vocabulary).

        `student` and `teacher` are float32 logits (tokens, vocabulary) and may be overwritten;
        `teacher` is None where `needs_teacher` is false; `labels` are the next tokens, int64 (tokens,).
        """

    @property
    def refuses_sparse(self) -> str | None:
        """Why a few of the teacher's probabilities are not enough, after "it "; None where they are."""
        return "compares whole distributions"

    def sparse_value_and_gradient(
        self, student: Tensor, targets: SparseTargets, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`value_and_gradient` with a few of the teacher's probabilities (tokens, slots) in place of its logits.

        Raises ValueError where `refuses_sparse`.
        """
        raise ValueError(f"{self.kind} {self.refuses_sparse}")  # type: ignore[attr-defined]

    def divided(
        self, student: Tensor, teacher: Tensor | None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Both models' logits over the temperature. Raises ValueError where there is no teacher."""
        if teacher is None:
            raise ValueError(f"{self.kind} needs the teacher's logits")  # type: ignore[attr-defined]
        return (student, teacher) if temperature == 1.0 else (student / temperature, teacher / temperature)


def by_logits(probabilities: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """A gradient by softmax(logits / temperature) as a gradient by the logits; overwrites `gradient`.

    Both are (tokens, vocabulary). A constant added to a row of `gradient` changes nothing.
    """
    gradient = gradient.mul_(probabilities)
    gradient.addcmul_(probabilities, gradient.sum(-1, keepdim=True), value=-1.0)
    return gradient if temperature == 1.0 else gradient.div_(temperature)
