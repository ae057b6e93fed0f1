"""`StateLoss`: what a file of `intermediate/` provides, and what a list of them comes to for two models.

L_is of the paper (§3): hidden states of teacher and student are compared token by token, always behind a
norm of the network itself. Where the models' widths differ, one linear map, learnt with the student and
shared by all pairs, lifts the student's states to the teacher's width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.kinds import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from minitron_ray.models.family import Family

Distance = Literal["cosine", "mse"]
Layer = Annotated[int, Field(ge=0)]
Layers = Annotated[tuple[tuple[Layer, Layer], ...], Field(min_length=1)]
"""Pairs (teacher's layer, student's layer), from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two modules, by their paths in the stock model, whose outputs are to agree."""

    teacher: str
    student: str
    distance: Distance

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of each token, float32 (samples, tokens), from states (samples, tokens, hidden) of one width:
        1 - cosine, or the mean of the squared differences."""
        from torch.nn.functional import mse_loss, normalize

        student, teacher = student.float(), teacher.float()
        if self.distance == "mse":
            return mse_loss(student, teacher, reduction="none").mean(-1)
        return 1 - (normalize(student, dim=-1) * normalize(teacher, dim=-1)).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intermediate:
    """The term beside the logits' loss, for one teacher and one student."""

    pairs: tuple[Pair, ...]
    """Their values are summed."""
    weight: float | None
    """Of the term; None is alpha = L_logits / L_is, of each sequence by itself: it then does not depend on
    how sequences are spread over workers and passes."""


class StateLoss(Plugin):
    """One kind of hidden state that is to agree."""

    distance: Distance = "cosine"
    """`cosine` is 1 - cosine of the angle, the paper's best; `mse` the mean squared difference."""

    @abstractmethod
    def pairs(self, family: Family, teacher: int, student: int) -> tuple[Pair, ...]:
        """For models of so many layers. Raises ConfigError for a layer that is not there."""


def last_but_two(teacher: int, student: int) -> tuple[tuple[int, int], ...]:
    """(last - 2):(last - 2), the paper's best map (Appendix A.6, Table 17): the last two layers are too
    specialised. The first layer where there are not as many."""
    return ((max(0, teacher - 3), max(0, student - 3)),)


def mapped(
    layers: Layers | Literal["auto"], teacher: int, student: int, where: str
) -> tuple[tuple[int, int], ...]:
    """The pairs of layers that are asked for. Raises ConfigError for one that is not there."""
    if layers == "auto":
        return last_but_two(teacher, student)
    for pair in layers:
        for layer, count, whose in zip(pair, (teacher, student), ("teacher", "student"), strict=True):
            if layer >= count:
                raise ConfigError(
                    f"distill.intermediate: {where} maps layer {layer} of the {whose}, which has layers 0 to "
                    f"{count - 1}; write [teacher's, student's] or leave layers out for (last-2):(last-2)"
                )
    return tuple(layers)


def normed_input(family: Family, layer: int, layers: int) -> str:
    """The path of the norm that layer `layer` begins with; of `layers`, the number there are, the final norm."""
    return family.final_norm if layer == layers else family.taps["hidden"][0].at(layer)


def intermediate_of(
    losses: Sequence[StateLoss], weight: float | None, family: Family, teacher: int, student: int
) -> Intermediate | None:
    """What `losses` come to between a teacher and a student of so many layers; None for none.

    Raises ConfigError for a family whose layers do not begin with a norm, and for layers that are not there.
    """
    if not losses:
        return None
    if not family.norms_inputs:
        raise ConfigError(
            f"distill.intermediate: states are compared behind a norm, and layers of {family.model_type} take "
            "their inputs without one; leave intermediate out to train on logits alone"
        )
    pairs = [pair for loss in losses for pair in loss.pairs(family, teacher, student)]
    twice = next((pair for number, pair in enumerate(pairs) if pair in pairs[:number]), None)
    if twice is not None:
        raise ConfigError(
            f"distill.intermediate: {twice.teacher} of the teacher and {twice.student} of the student are "
            "compared twice; name each pair once"
        )
    return Intermediate(pairs=tuple(pairs), weight=weight)
