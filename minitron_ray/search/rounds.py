"""Which shapes iterative importance scores on its way from the teacher to the smallest student (paper §1.6)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from minitron_ray.importance.rounds import schedule
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family
from minitron_ray.search.shape import Candidate, Refusals, shape_of

WIDTHS: Final = ("hidden", "heads", "kv_heads", "mlp", "experts", "expert_mlp")

_TIED: Final = (("mlp",), ("experts",), ("expert_mlp",), ("kv_heads", "heads"), ("heads", "hidden"))
"""Axes that are fixed together, since one may have to be a multiple of the other."""


def round_shapes(
    family: Family, teacher: Architecture, students: Sequence[Candidate], rounds: int
) -> list[Candidate]:
    """The shapes that are scored after the first round: on each axis the schedule's size on the way to the
    smallest of `students`, or the next larger that can be cut and built.

    All layers stay. Where no such shape is smaller than the one before, a round scores that one again.
    """
    steps = {
        axis: schedule(getattr(teacher, axis), min(getattr(s, axis) for s in students), rounds)
        for axis in WIDTHS
    }
    found = [shape_of(teacher, {})]
    refusals = Refusals(family, teacher)
    for number in range(rounds - 1):
        wanted = {axis: sizes[number] for axis, sizes in steps.items()}
        found.append(_nearest(teacher, refusals, wanted, found[-1]))
    return found[1:]


def _nearest(
    teacher: Architecture, refusals: Refusals, wanted: dict[str, int], before: Candidate
) -> Candidate:
    """The shape between `wanted` and `before` that is smallest on one axis after the other."""
    sizes = {axis: getattr(before, axis) for axis in WIDTHS}
    if teacher.heads_per_group == 1:
        del sizes["kv_heads"]  # they follow the heads
    for together in _TIED:
        axes = [axis for axis in together if axis in sizes]
        between = [range(wanted[axis], getattr(before, axis) + 1) for axis in axes]
        for found in itertools.product(*between):
            tried = sizes | dict(zip(axes, found, strict=True))
            if refusals.of(shape_of(teacher, tried)) is None:
                sizes = tried
                break
    return shape_of(teacher, sizes)
