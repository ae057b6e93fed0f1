"""Random scores: the control that every other metric has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from minitron_ray.importance.metric import StaticUnitMetric

if TYPE_CHECKING:
    from minitron_ray.importance.units import UnitScores
    from minitron_ray.models.architecture import Architecture
    from minitron_ray.models.family import Family
    from minitron_ray.weights.checkpoint import Checkpoint


class Random(StaticUnitMetric):
    """Uniform in [0, 1), drawn for each axis by itself: the same seed gives the same scores on every machine."""

    kind: Literal["random"] = "random"
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def label(self) -> str:
        return f"random(seed={self.seed})"

    def score(self, checkpoint: Checkpoint, family: Family, architecture: Architecture) -> UnitScores:
        import numpy as np

        from minitron_ray.importance.units import UnitScores, unit_shapes

        shapes = unit_shapes(family, architecture)
        streams = np.random.SeedSequence(self.seed).spawn(len(shapes))
        return UnitScores(
            **{
                axis: np.random.default_rng(stream).random(shape)
                for (axis, shape), stream in zip(shapes.items(), streams, strict=True)
            }
        )
