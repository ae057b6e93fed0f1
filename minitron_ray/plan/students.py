"""The shapes of an experiment in the order of what they cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minitron_ray.models.architecture import CUT_AXES, Architecture
from minitron_ray.models.budget import Load
from minitron_ray.models.counting import Column, count
from minitron_ray.models.family import Family
from minitron_ray.search.space import CandidateRow


def costliest_first(
    family: Family, start: Architecture, rows: Sequence[CandidateRow], length: int
) -> tuple[Architecture, ...]:
    """The students of `start` by operations a token over sequences of `length`; equals in their own order."""
    shapes = [row.candidate for row in rows]
    sizes: dict[str, Column] = {
        axis: np.array([getattr(shape, axis) for shape in shapes], dtype=np.int64) for axis in CUT_AXES
    }
    flops = count(family, start, sizes, Load(batch=1, length=length)).flops_per_token
    return tuple(shapes[place].architecture(start) for place in np.argsort(-flops, kind="stable"))
