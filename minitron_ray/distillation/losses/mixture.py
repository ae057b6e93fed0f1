"""A weighted sum of other losses, such as the paper's L_CLM + L_logits (§3, Table 15)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from minitron_ray.core.kinds import Section, one_of
from minitron_ray.distillation.loss import DistillationLoss

if TYPE_CHECKING:
    from torch import Tensor

    OtherLoss: TypeAlias = DistillationLoss
else:
    OtherLoss = one_of("minitron_ray.distillation.losses", without=("mixture",))


class Term(Section):
    """One loss of the sum."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    loss: OtherLoss
    """Any loss but a mixture: a sum of sums is one sum."""


class Mixture(DistillationLoss):
    """The sum of weight times loss over the terms; cross entropy and forward KL, if none are named."""

    kind: Literal["mixture"] = "mixture"
    terms: Annotated[tuple[Term, ...], Field(min_length=1)] = (
        Term.model_validate({"loss": {"kind": "cross_entropy"}}),
        Term.model_validate({"loss": {"kind": "forward_kl"}}),
    )

    @property
    def needs_teacher(self) -> bool:
        return any(term.loss.needs_teacher for term in self.terms)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        value, gradient = student.new_zeros(len(student)), None
        for index, term in enumerate(self.terms):
            given: tuple[Tensor, Tensor | None] = student, teacher
            if index + 1 < len(self.terms):  # a loss may overwrite what it is given
                given = student.clone(), teacher.clone() if teacher is not None else None
            part, slope = term.loss.value_and_gradient(*given, labels)
            value.add_(part, alpha=term.weight)
            slope = slope.mul_(term.weight)
            gradient = slope if gradient is None else gradient.add_(slope)
        assert gradient is not None
        return value, gradient
