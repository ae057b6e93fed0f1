"""Which units a student of a given shape keeps: the best-scored of the teacher's (paper §2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minitron_ray.core.errors import MinitronError
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.kept import Indices, Kept
from minitron_ray.search.space import Candidate

if TYPE_CHECKING:
    from minitron_ray.importance.scores import Scores


def select(scores: Scores, candidate: Candidate, teacher: Architecture) -> Kept:
    """The best-scored units; among equals, the first.

    Layers: the lowest scores go. Hidden channels: one ranking for the whole model, since the residual
    stream ties them together. Neurons and heads: one ranking for each layer; heads inside each KV
    group, equally many of every group.

    Raises MinitronError where a score is not finite, ValueError where scores and teacher do not fit.
    """
    _check(scores, teacher)
    layers = _best(scores.layers, candidate.layers)
    return Kept(
        layers=layers,
        hidden=_best(scores.hidden, candidate.hidden),
        heads=tuple(_best_heads(scores.heads[layer], candidate.heads, teacher) for layer in layers),
        mlp=tuple(_best(scores.mlp[layer], candidate.mlp) for layer in layers),
    )


def _best(scores: NDArray, count: int) -> Indices:
    """Indices of the `count` largest scores, ascending."""
    if not 1 <= count <= len(scores):
        raise ValueError(f"{count} of {len(scores)} units can't be kept")
    ranked = np.argsort(-scores, kind="stable")
    return tuple(np.sort(ranked[:count]).tolist())


def _best_heads(scores: NDArray, count: int, teacher: Architecture) -> Indices:
    """The best heads of each KV group; head h belongs to group h // heads_per_group."""
    share, rest = divmod(count, teacher.kv_heads)
    if rest:
        raise ValueError(f"{count} heads do not divide into {teacher.kv_heads} KV groups")
    size = teacher.heads_per_group
    return tuple(
        group * size + head
        for group in range(teacher.kv_heads)
        for head in _best(scores[group * size : (group + 1) * size], share)
    )


def _check(scores: Scores, teacher: Architecture) -> None:
    expected = {
        "layers": (teacher.layers,),
        "hidden": (teacher.hidden,),
        "heads": (teacher.layers, teacher.heads),
        "mlp": (teacher.layers, teacher.mlp),
    }
    for axis, shape in expected.items():
        values: NDArray = getattr(scores, axis)
        if values.shape != shape:
            raise ValueError(
                f"importance scores of {axis} have shape {values.shape}, the teacher has {shape}"
            )
        if not np.isfinite(values).all():
            where = ", ".join(map(str, np.argwhere(~np.isfinite(values))[0]))
            raise MinitronError(
                f"importance: the score of {axis} [{where}] is not a finite number, so units can't be "
                f"ranked; measure in float32 (precision: float32) or check the teacher's weights"
            )
