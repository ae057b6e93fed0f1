"""`UnitScores`: what one width metric says about every width axis of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minitron_ray.importance.scores import Scores
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitScores:
    """float64 arrays, the larger the more important; None for an axis that the family does not have.

    `hidden` (hidden,); the others begin with the layer: `heads` (layers, heads), `kv_heads` (layers,
    kv_heads), `mlp` (layers, mlp), `experts` (layers, experts), `expert_mlp` (layers, experts, expert_mlp).
    """

    hidden: NDArray
    heads: NDArray
    kv_heads: NDArray
    mlp: NDArray | None = None
    experts: NDArray | None = None
    expert_mlp: NDArray | None = None

    def axes(self) -> dict[str, NDArray]:
        """The axes that there are, by name."""
        named = {
            "hidden": self.hidden,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "mlp": self.mlp,
            "experts": self.experts,
            "expert_mlp": self.expert_mlp,
        }
        return {axis: values for axis, values in named.items() if values is not None}

    def with_layers(self, layers: Mapping[int, NDArray]) -> Scores:
        """Joined with the scores of layers, by block length; with none, only the units are in the table."""
        single = layers.get(1, np.full(len(self.heads), np.nan))
        blocks = {length: values for length, values in layers.items() if length > 1}
        return Scores(layers=single, blocks=blocks, **self.axes())


def of_groups(heads: NDArray, architecture: Architecture) -> NDArray:
    """Scores of KV groups, (layers, kv_heads), from those of their query heads, (layers, heads).

    A group is worth the norm of what its heads are worth: with one head a group, what the head is.
    """
    grouped = heads.reshape(len(heads), architecture.kv_heads, architecture.heads_per_group)
    return np.sqrt(np.square(grouped).sum(axis=-1))


def unit_shapes(family: Family, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The shapes that `UnitScores` has for a teacher, axis by axis, always in the same order."""
    layers = architecture.layers
    shapes = {
        "hidden": (architecture.hidden,),
        "heads": (layers, architecture.heads),
        "kv_heads": (layers, architecture.kv_heads),
        "mlp": (layers, architecture.mlp),
        "experts": (layers, architecture.experts),
        "expert_mlp": (layers, architecture.experts, architecture.expert_mlp),
    }
    present = {"hidden", "heads", "kv_heads", *family.cut_axes}
    return {axis: shape for axis, shape in shapes.items() if axis in present}
