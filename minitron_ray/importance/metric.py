"""The contracts of `width/` and `depth/`: how a metric scores the units and the layers of a teacher.

Listening metrics gather evidence while the teacher runs over the calibration sequences, all of them
in one pass. Evidence of disjoint sequences is merged; merging in a fixed order gives the same bits
however many processes gathered it. Other width metrics need no pass, other depth metrics run the
teacher many times with layers left out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from minitron_ray.core.kinds import Plugin

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from minitron_ray.evaluation.task import Batch, Examples, Material
    from minitron_ray.importance.units import UnitScores
    from minitron_ray.models.architecture import Architecture
    from minitron_ray.models.family import Family
    from minitron_ray.weights.checkpoint import Checkpoint

HeadRule = Literal["norm", "channels"]


class UnitEvidence(Protocol):
    """What one site of the network says about its units."""

    def add(self, activations: Tensor) -> None:
        """One batch, (samples, tokens, units), any float dtype."""

    def add_routed(self, activations: Tensor, sample: Tensor, samples: int) -> None:
        """The tokens of one batch that a router sent here: (tokens, units), and to which of the batch's
        `samples` each belongs, int64 (tokens,). A sample without tokens says nothing."""

    def merge(self, later: Self) -> None:
        """Take in the evidence of other sequences at the same site."""

    def rest(self) -> None:
        """Leave the accelerator: what was gathered so far goes to host memory, to be pickled."""

    def scores(self) -> Mapping[str, NDArray]:
        """float64 (units,) under each of the metric's `labels`, the larger the more important."""


class StreamEvidence(Protocol):
    """What the decoder layers do to the residual stream."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Block lengths that it wants to hear, ascending; 1 among them."""

    def add(self, start: int, length: int, before: Tensor, after: Tensor) -> None:
        """One batch of the residual stream, (samples, tokens, hidden), before layer `start` and before layer
        `start + length` (behind the last layer: before the final norm)."""

    def merge(self, later: Self) -> None:
        """Take in the evidence of other sequences."""

    def rest(self) -> None:
        """Leave the accelerator, see `UnitEvidence.rest`."""

    def scores(self) -> Mapping[int, NDArray]:
        """Block length n to float64 (layers - n + 1,): entry i scores the layers i to i+n-1 together."""


class UnitMetric(Plugin):
    """Scores every width axis: hidden channels, heads, KV groups, MLP neurons, experts and their neurons."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What the `metric` column of the table says."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All the labels that come out of one measurement, `label` among them."""
        return (self.label,)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the table: metrics of equal identity share one measurement. A part of fingerprints."""
        return self.model_dump(mode="json")


class ListeningUnitMetric(UnitMetric):
    """A width metric that hears the activations of a forward pass."""

    heads: HeadRule = "norm"
    """`norm`: a head's activation is the norm of its output at each token (paper §2.2). `channels`: each
    channel of its output is scored, and the head's score is the norm of its channels' (NVIDIA's code)."""
    final_norm: bool = False
    """Whether the norm behind the last layer is a site of the hidden axis as well."""

    @abstractmethod
    def evidence(self) -> UnitEvidence:
        """A fresh gatherer for one site."""


class StaticUnitMetric(UnitMetric):
    """A width metric that needs no forward pass."""

    @abstractmethod
    def score(self, checkpoint: Checkpoint, family: Family, architecture: Architecture) -> UnitScores:
        """The scores of every width axis, from the teacher's files."""


class LayerMetric(Plugin):
    """Scores decoder layers, each by itself and, where asked, contiguous blocks of them."""

    blocks: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """Block lengths that are scored too: a student with as many layers less than its teacher loses the
    block with the lowest score, instead of the lowest layers one by one."""

    @field_validator("blocks")
    @classmethod
    def _each_length_once(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(blocks)))

    @property
    @abstractmethod
    def label(self) -> str:
        """What the `metric` column of the table says."""

    @property
    def identity(self) -> dict[str, Any]:
        """See `UnitMetric.identity`."""
        return self.model_dump(mode="json")

    def inputs(self, base: Path) -> dict[str, Any]:
        """Digests of the files it reads, see `Task.inputs`."""
        return {}


class ListeningLayerMetric(LayerMetric):
    """A depth metric that hears the residual stream in the same pass as the width metric."""

    @abstractmethod
    def evidence(self, layers: int) -> StreamEvidence:
        """A fresh gatherer for a teacher of `layers` layers. Raises ConfigError for blocks that are longer."""


class RemovalMetric(LayerMetric):
    """A depth metric that runs the teacher with layers left out, see `removal.py`.

    Every example has one value with each set of layers left out, so that values of a split over workers
    are put together without a trace of it.
    """

    iterative: bool = False
    """Remove the least important layer, score the others again without it, and so on. The scores are then
    ranks: the layer that went first has 0, those that stay have the highest."""

    @model_validator(mode="after")
    def _one_way_to_remove_many(self) -> Self:
        if self.iterative and self.blocks:
            raise ValueError("iterative removes layers one by one and blocks at once; leave one of them out")
        return self

    def examples(self, material: Material) -> Examples:
        """What the network is run on; the calibration sequences where nothing else is said."""
        return material.calibration

    @abstractmethod
    def values(
        self, outputs: Sequence[Tensor], batch: Batch, head: Tensor, softcap: float | None = None
    ) -> NDArray:
        """One value an example with each set of layers left out, float64 (outputs, examples).

        `outputs` are the final hidden states of a batch, (rows, tokens, hidden), the first of them those
        of the whole network. See `Task.values` for the others.
        """

    @abstractmethod
    def reduce(self, values: NDArray) -> NDArray:
        """Scores, float64 (outputs - 1,), the larger the more important, from the values of all examples,
        (outputs, examples); the first row is that of the whole network."""
