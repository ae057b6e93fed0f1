"""Uniform choice among the feasible shapes: the control every other sampler must beat."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random as Lot
from typing import Literal

from minitron_ray.search.sampler import OrderedSampler


class Random(OrderedSampler):
    """Every feasible shape is equally likely, which sizes drawn one by one would not be."""

    kind: Literal["random"] = "random"

    def ordered(self, feasible: Sequence[str], seed: int) -> list[str]:
        return Lot(seed).sample(feasible, len(feasible))
