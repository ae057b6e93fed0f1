"""The contracts of `width/` and `depth/`: how a metric gathers evidence from one forward pass."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Protocol

from minitron_ray.core.kinds import Plugin

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class UnitEvidence(Protocol):
    """Gathers what one site of the network says about its units."""

    def add(self, activations: Tensor) -> None:
        """One batch, (samples, tokens, units), any float dtype."""

    def scores(self) -> NDArray:
        """float64 (units,), the larger the more important."""


class LayerEvidence(Protocol):
    """Gathers what one decoder layer does to the residual stream."""

    def add(self, before: Tensor, after: Tensor) -> None:
        """One batch: the layer's input and output, (samples, tokens, hidden)."""

    def score(self) -> float:
        """The larger, the more important."""


class UnitMetric(Plugin):
    """Scores hidden channels, heads and MLP neurons."""

    @abstractmethod
    def evidence(self) -> UnitEvidence:
        """A fresh gatherer for one site."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What the `metric` column of the table says."""


class LayerMetric(Plugin):
    """Scores decoder layers."""

    @abstractmethod
    def evidence(self) -> LayerEvidence:
        """A fresh gatherer for one layer."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What the `metric` column of the table says."""
