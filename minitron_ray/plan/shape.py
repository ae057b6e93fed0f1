"""A fixed shape: completed from the teacher's sizes, checked, and counted."""

from __future__ import annotations

from minitron_ray.core.errors import ConfigError
from minitron_ray.experiment import Shape
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.cost import forward_flops, serving_bytes
from minitron_ray.models.family import Family
from minitron_ray.search.selection import CutRules
from minitron_ray.search.shape import Refusals, check_axes, shape_of
from minitron_ray.search.space import CandidateRow


def fixed_shape(
    family: Family, teacher: Architecture, shape: Shape, rules: CutRules, length: int
) -> CandidateRow:
    """The one candidate of an experiment that gives its student's sizes, counted for one sequence of
    `length` tokens in bfloat16.

    Raises ConfigError for an axis that the family does not have or that is larger than the teacher's,
    and for sizes that do not go together, that the rules cannot cut or that stock transformers refuses.
    """
    check_axes(family, shape.sizes, "shape")
    for axis, size in shape.sizes.items():
        own = getattr(teacher, axis)
        if size > own:
            raise ConfigError(
                f"shape.{axis}: {size} is larger than the teacher's {own}; a cut only makes smaller, so give "
                f"{own} or less"
            )
    candidate = shape_of(teacher, shape.sizes, rules)
    arch = candidate.architecture(teacher)
    if problem := Refusals(family, teacher, rules).of(candidate):
        raise ConfigError(
            f"shape: {arch.shape_text()} can't be cut from the teacher's {teacher.shape_text()}: {problem}; "
            "change the sizes that this is about"
        )
    return CandidateRow(
        candidate=candidate,
        parameters=family.parameters(arch),
        non_embedding_parameters=family.non_embedding_parameters(arch),
        memory_bytes=serving_bytes(family, arch, "bfloat16", batch=1, length=length),
        flops_per_token=forward_flops(family, arch, length),
        in_budget=True,
        reason=None,
    )
