"""Squared distance from the teacher's distribution or logits (paper §3, Table 15)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from minitron_ray.distillation.loss import DistillationLoss, by_logits

if TYPE_CHECKING:
    from torch import Tensor


class MSE(DistillationLoss):
    """Squared differences of the two models, on probabilities or logits.

    The paper's formula is on probabilities, which the text does not repeat. Probabilities are summed
    over the vocabulary, like every divergence here: a mean would divide by its tens of thousands of
    tokens, and a sum with another loss would hold next to nothing of it. Logits are averaged, after
    each token's mean is taken off: a constant added to all of them predicts the same.
    """

    kind: Literal["mse"] = "mse"
    on: Literal["probabilities", "logits"] = "probabilities"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both models' logits; for probabilities only."""

    needs_teacher: ClassVar[bool] = True

    @model_validator(mode="after")
    def _temperature_of_probabilities(self) -> Self:
        if self.on == "logits" and self.temperature != 1.0:
            raise ValueError("on logits a temperature only rescales the loss; leave temperature out")
        return self

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        student, teacher = self.divided(student, teacher, self.temperature)
        if self.on == "logits":
            difference = student - teacher
            difference.sub_(difference.mean(-1, keepdim=True))
            return difference.square().mean(-1), difference.mul_(2 / difference.shape[-1])
        probabilities = student.softmax(-1)
        difference = probabilities - teacher.softmax(-1)
        value = difference.square().sum(-1)
        return value, by_logits(probabilities, difference.mul_(2), self.temperature)
