"""Cosine distance from the teacher's distribution or logits (paper §3, Table 15)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from minitron_ray.distillation.loss import DistillationLoss, by_logits

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST_NORM: Final = 1e-8
"""Shorter vectors (logits that are all equal) have no direction: their cosine is taken as nearly zero."""


class Cosine(DistillationLoss):
    """1 - cosine of the angle between the two models' vectors over the vocabulary.

    The paper's formula is on probabilities, which the text does not repeat. From logits each token's
    mean is taken off first: a constant added to all of them predicts the same.
    """

    kind: Literal["cosine"] = "cosine"
    on: Literal["probabilities", "logits"] = "probabilities"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both models' logits; for probabilities only."""

    needs_teacher: ClassVar[bool] = True

    @model_validator(mode="after")
    def _temperature_of_probabilities(self) -> Self:
        if self.on == "logits" and self.temperature != 1.0:
            raise ValueError("the angle between logits has no temperature; leave temperature out")
        return self

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        student, teacher = self.divided(student, teacher, self.temperature)
        if self.on == "logits":
            return _distance(
                student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
            )
        probabilities = student.softmax(-1)
        value, gradient = _distance(probabilities, teacher.softmax(-1))
        return value, by_logits(probabilities, gradient, self.temperature)


def _distance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos(a, b) of each row, and its gradient by `a`; overwrites `b`."""
    length = a.norm(dim=-1, keepdim=True).clamp_min_(_SMALLEST_NORM)
    a = a / length
    b = b.div_(b.norm(dim=-1, keepdim=True).clamp_min_(_SMALLEST_NORM))
    cosine = (a * b).sum(-1, keepdim=True)
    return (1 - cosine)[:, 0], a.mul_(cosine).sub_(b).div_(length)
