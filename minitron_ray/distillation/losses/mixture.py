"""A weighted sum of other losses, such as the paper's L_CLM + L_logits (§3, Table 15)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from minitron_ray.core.kinds import Section, one_of
from minitron_ray.distillation.loss import DistillationLoss

if TYPE_CHECKING:
    from torch import Tensor

    from minitron_ray.distillation.targets import SparseTargets

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
        def term(loss: DistillationLoss, logits: Tensor, last: bool) -> tuple[Tensor, Tensor]:
            # A loss may overwrite what it is given.
            given = teacher if last or teacher is None else teacher.clone()
            return loss.value_and_gradient(logits, given, labels)

        return self._summed(student, term)

    @property
    def refuses_sparse(self) -> str | None:
        """Where one of its terms does."""
        for term in self.terms:
            if term.loss.refuses_sparse is not None:
                return f"has a term {term.loss.kind}, which {term.loss.refuses_sparse}"  # type: ignore[attr-defined]
        return None

    def sparse_value_and_gradient(
        self, student: Tensor, targets: SparseTargets, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        def term(loss: DistillationLoss, logits: Tensor, last: bool) -> tuple[Tensor, Tensor]:
            return loss.sparse_value_and_gradient(logits, targets, labels)

        return self._summed(student, term)

    def _summed(
        self, student: Tensor, term: Callable[[DistillationLoss, Tensor, bool], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """`term(loss, logits, last)` of every term, weighted; each has logits of its own to overwrite."""
        value, gradient = student.new_zeros(len(student)), None
        for index, part in enumerate(self.terms):
            last = index + 1 == len(self.terms)
            found, slope = term(part.loss, student if last else student.clone(), last)
            value.add_(found, alpha=part.weight)
            slope = slope.mul_(part.weight)
            gradient = slope if gradient is None else gradient.add_(slope)
        assert gradient is not None
        return value, gradient
