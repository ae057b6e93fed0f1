"""Counts of tens of thousands of students at once: the family's table read over arrays of sizes.

Each figure equals that of the function for one architecture: `Family.parameters`,
`cost.serving_bytes` and `cost.forward_flops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitron_ray.models.architecture import Architecture
from minitron_ray.models.budget import Load
from minitron_ray.models.cost import BYTES
from minitron_ray.models.family import Family, Monomials, monomials

Column = NDArray[np.int64]


class Counts(NamedTuple):
    """Of each student, (students,) int64; see the columns of the table `candidates`."""

    parameters: Column
    non_embedding_parameters: Column
    memory_bytes: Column
    flops_per_token: Column


def count(family: Family, teacher: Architecture, sizes: Mapping[str, Column], load: Load) -> Counts:
    """Students of `teacher` with these sizes by axis, (students,) int64; an axis that is not among them
    keeps the teacher's size."""
    total, embedding = (_evaluate(part, teacher, sizes) for part in family.polynomials(teacher))
    cache = 2 * _product(("layers", "kv_heads", "head_dim"), teacher, sizes) * load.batch * load.length
    return Counts(
        parameters=total,
        non_embedding_parameters=total - embedding,
        memory_bytes=(total + cache) * BYTES[load.dtype],
        flops_per_token=_forward_flops(family, teacher, sizes, load.length),
    )


def _forward_flops(family: Family, teacher: Architecture, sizes: Mapping[str, Column], length: int) -> Column:
    """See `cost.forward_flops`."""
    matrices = [
        tensor
        for tensor in family.tensors
        if len(tensor.dims) == 2 and tensor.per_layer and tensor.exists(teacher)
    ]
    multiplied = _evaluate(monomials(matrices, experts="active_experts"), teacher, sizes)
    multiplied = multiplied + _product(("hidden", "vocab"), teacher, sizes)
    attention = 2 * _product(("layers", "heads", "head_dim"), teacher, sizes) * (length + 1)
    return 2 * multiplied + attention


def _evaluate(polynomial: Monomials, teacher: Architecture, sizes: Mapping[str, Column]) -> Column:
    total = np.zeros(len(next(iter(sizes.values()))), dtype=np.int64)
    for factor, axes in polynomial:
        total += factor * _product(axes, teacher, sizes)
    return total


def _product(axes: tuple[str, ...], teacher: Architecture, sizes: Mapping[str, Column]) -> Column:
    product = np.ones(len(next(iter(sizes.values()))), dtype=np.int64)
    for axis in axes:
        product *= sizes[axis] if axis in sizes else getattr(teacher, axis)
    return product
