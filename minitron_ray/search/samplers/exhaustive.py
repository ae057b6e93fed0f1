"""Every feasible shape, in the order of enumeration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from minitron_ray.search.sampler import OrderedSampler


class Exhaustive(OrderedSampler):
    """Needs as many trials as there are feasible shapes; used by itself where there are enough."""

    kind: Literal["exhaustive"] = "exhaustive"

    def ordered(self, feasible: Sequence[str], seed: int) -> list[str]:
        return list(feasible)
