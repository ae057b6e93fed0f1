"""What layers hand on (L_o of the paper, §3): heard behind the norm that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from minitron_ray.distillation.state_loss import Layers, Pair, StateLoss, mapped, normed_input

if TYPE_CHECKING:
    from minitron_ray.models.family import Family


class HiddenStates(StateLoss):
    """Outputs of pairs of layers, behind the norm that the next layer begins with, or the final norm."""

    kind: Literal["hidden_states"] = "hidden_states"
    layers: Layers | Literal["auto"] = "auto"
    """[teacher's, student's] layers, from 0; `auto` is (last-2):(last-2)."""

    def pairs(self, family: Family, teacher: int, student: int) -> tuple[Pair, ...]:
        return tuple(
            Pair(
                teacher=normed_input(family, above + 1, teacher),
                student=normed_input(family, below + 1, student),
                distance=self.distance,
            )
            for above, below in mapped(self.layers, teacher, student, self.kind)
        )
