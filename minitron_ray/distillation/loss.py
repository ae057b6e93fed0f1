"""`DistillationLoss`: what a file of `losses/` provides."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from minitron_ray.core.kinds import Plugin

if TYPE_CHECKING:
    from torch import Tensor


class DistillationLoss(Plugin):
    """A loss per token on logits, with its gradient in closed form.

    The gradient is formed together with the value, chunk by chunk, so that no
    (tokens x vocabulary) matrix outlives its chunk (see `vocabulary.py`).
    """

    needs_teacher: ClassVar[bool]

    @abstractmethod
    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of each token, float32 (tokens,), and its gradient by the student's logits, (tokens, vocabulary).

        `student` and `teacher` are float32 logits (tokens, vocabulary) and may be overwritten;
        `teacher` is None where `needs_teacher` is false; `labels` are the next tokens, int64 (tokens,).
        """
