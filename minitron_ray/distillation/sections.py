"""What an experiment says of a training: its optimizer, and what is learnt from the teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from minitron_ray.core.kinds import Section
from minitron_ray.core.units import Fraction, SequenceCount
from minitron_ray.distillation import Loss, StateLosses
from minitron_ray.distillation.losses.forward_kl import ForwardKL


class Optimization(Section):
    """AdamW with warm-up and cosine decay by tokens, gradients clipped."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    minimum_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    warmup: Fraction = 0.05
    """Share of the tokens over which the rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm."""
    batch: SequenceCount = 4
    """Sequences an optimizer step, over all workers."""

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        if self.minimum_learning_rate > self.learning_rate:
            raise ValueError(
                f"minimum_learning_rate {self.minimum_learning_rate} is above learning_rate {self.learning_rate}"
            )
        return self


def _known_intermediate(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        raise PydanticCustomError(
            "unit_shape", "", {"expected": "auto or a list", "hint": "", "found": repr(value)}
        )
    return value


Intermediate = Annotated[Literal["auto"] | tuple[StateLosses, ...], BeforeValidator(_known_intermediate)]


class Distillation(Optimization):
    """What is learnt from the teacher."""

    loss: Loss = ForwardKL()
    intermediate: Intermediate = ()
    """Hidden states that are to agree with the teacher's, beside the logits: a list of kinds, [] for none.
    `auto` takes hidden_states and embedding for a student that has lost a quarter of the teacher's layers
    or more, none for others."""
    intermediate_weight: Literal["dynamic"] | Annotated[float, Field(gt=0)] = "dynamic"
    """Of their loss; `dynamic` makes it as large as that of the logits (paper §3)."""

    @model_validator(mode="after")
    def _something_to_weigh(self) -> Self:
        if not self.intermediate and self.intermediate_weight != "dynamic":
            raise ValueError(
                f"intermediate_weight is {self.intermediate_weight}, but no hidden states are compared; leave it "
                "out, or name some in intermediate"
            )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is learnt from the teacher: `auto` adds nothing to a loss that takes nothing of it."""
        named = self.intermediate != "auto" and len(self.intermediate) > 0
        return bool(self.loss.needs_teacher or named)
