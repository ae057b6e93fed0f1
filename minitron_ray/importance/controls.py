"""`control_scores`: importance without data, for cuts that need no run: by weight magnitude, or at random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from minitron_ray.importance.units import UnitScores
from minitron_ray.importance.width.random import Random
from minitron_ray.importance.width.weight_magnitude import WeightMagnitude

if TYPE_CHECKING:
    from minitron_ray.importance.scores import Scores
    from minitron_ray.models.architecture import Architecture
    from minitron_ray.models.family import Family
    from minitron_ray.weights.checkpoint import Checkpoint

Control = Literal["magnitude", "random"]
CONTROLS: Final[tuple[Control, ...]] = ("magnitude", "random")


def control_scores(
    control: Control, seed: int, checkpoint: Checkpoint, family: Family, architecture: Architecture
) -> Scores:
    """Scores of all units and layers; `magnitude` reads every weight once, `random` none.

    Raises MinitronError where a weight that is read is not finite.
    """
    if control == "random":
        units = Random(seed=seed).score(checkpoint, family, architecture)
        layers = np.random.default_rng([seed, 1]).random(architecture.layers)
    else:
        units = WeightMagnitude().score(checkpoint, family, architecture)
        layers = _magnitudes(units, architecture)
    return units.with_layers({1: layers})


def _magnitudes(units: UnitScores, architecture: Architecture) -> NDArray:
    """Of each layer the L2 norm of its matrices, float64: the sum over its heads, groups, neurons and
    experts, each of which is scored by the norm of its own rows and columns."""
    parts = [units.heads, units.mlp, units.experts]
    if architecture.heads_per_group > 1:  # else a head's score has its keys and values in it
        parts.append(units.kv_heads)
    total = np.zeros(architecture.layers)
    for part in parts:
        if part is not None:
            total += np.square(part).sum(axis=1)
    return np.sqrt(total)
