"""What the layers begin with (L_emb of the paper, §3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from minitron_ray.distillation.state_loss import Pair, StateLoss, normed_input

if TYPE_CHECKING:
    from minitron_ray.models.family import Family


class Embedding(StateLoss):
    """The embedded tokens, behind the norm that the first layer begins with."""

    kind: Literal["embedding"] = "embedding"

    def pairs(self, family: Family, teacher: int, student: int) -> tuple[Pair, ...]:
        first = (normed_input(family, 0, teacher), normed_input(family, 0, student))
        return (Pair(teacher=first[0], student=first[1], distance=self.distance),)
