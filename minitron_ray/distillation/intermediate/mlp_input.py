"""What goes into an MLP (L_i of the paper, §3, which made no difference there: Appendix A.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from minitron_ray.distillation.state_loss import Layers, Pair, StateLoss, mapped

if TYPE_CHECKING:
    from minitron_ray.models.family import Family


class MLPInput(StateLoss):
    """The inputs of the MLPs, or of the experts' routers, of pairs of layers: outputs of the norm before."""

    kind: Literal["mlp_input"] = "mlp_input"
    layers: Layers | Literal["auto"] = "auto"
    """[teacher's, student's] layers, from 0; `auto` is (last-2):(last-2)."""

    def pairs(self, family: Family, teacher: int, student: int) -> tuple[Pair, ...]:
        norm = family.taps["hidden"][1]
        return tuple(
            Pair(teacher=norm.at(above), student=norm.at(below), distance=self.distance)
            for above, below in mapped(self.layers, teacher, student, self.kind)
        )
