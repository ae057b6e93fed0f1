"""`shape_for`: sizes given by name as a shape that can be cut from a teacher; else the reason why not."""

from __future__ import annotations

from collections.abc import Mapping

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.sections import nearest
from minitron_ray.models.architecture import CUT_AXES, Architecture
from minitron_ray.models.family import Family
from minitron_ray.search.selection import CutRules
from minitron_ray.search.shape import Candidate, Refusals, shape_of


def read_sizes(text: str) -> dict[str, int]:
    """`layers=32,hidden=4_096` as axis to size. Raises ConfigError for anything else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not axis:
            raise ConfigError(f"--to: expected axis=size pairs like layers=32,hidden=4096, found {part!r}")
        if axis not in CUT_AXES:
            near = nearest(axis, CUT_AXES)
            hint = f"did you mean '{near}'? " if near else ""
            raise ConfigError(f"--to: unknown axis {axis!r}; {hint}axes are {', '.join(CUT_AXES)}")
        if axis in sizes:
            raise ConfigError(f"--to: {axis} is given twice")
        digits = size.replace("_", "")
        if not digits.isascii() or not digits.isdecimal() or not 1 <= int(digits) < 10**12:
            raise ConfigError(f"--to: {axis} must be a whole number of at least 1, found {size!r}")
        sizes[axis] = int(digits)
    return sizes


def shape_for(family: Family, teacher: Architecture, sizes: Mapping[str, int], rules: CutRules) -> Candidate:
    """The shape with these sizes (see `search.shape.shape_of`). Raises ConfigError where it cannot be cut
    from the teacher, or stock transformers would refuse it."""
    for axis in sizes:
        if axis not in family.cut_axes:
            raise ConfigError(
                f"--to: {family.model_type} has no {axis} to cut; it has {', '.join(family.cut_axes)}"
            )
    candidate = shape_of(teacher, sizes, rules)
    if problem := Refusals(family, teacher, rules, way_out="--as {type}").of(candidate):
        raise ConfigError(f"--to: {candidate.shape_text()} can't be cut from the teacher: {problem}")
    return candidate
