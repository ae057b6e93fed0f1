"""Iterative importance (paper §1.6): score, drop a part of what is to go, score what is left again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minitron_ray.importance.units import UnitScores
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.kept import Kept


def schedule(source: int, target: int, rounds: int) -> tuple[int, ...]:
    """The sizes after each of `rounds` rounds: equal steps from `source` down to `target`.

    Round i (from 0) scores at size source - i * (source - target) / rounds. Sizes between are rounded
    up, so that no round drops more than its share.
    """
    return tuple(source - (source - target) * number // rounds for number in range(1, rounds + 1))


def joined(rounds: Sequence[tuple[Kept, UnitScores]], teacher: Architecture) -> UnitScores:
    """One ranking of the teacher's units: those that went in an earlier round rank lower, those that went
    in the same round, or stayed, by the last score they had.

    Each round is the teacher's units that it scored (all of them in the first, all layers always), and
    their scores. A unit's joint score is the number of the last round that scored it, plus half of its
    score there in parts of the round's largest.
    """
    first = rounds[0][1].axes()
    found = {axis: np.zeros(values.shape) for axis, values in first.items()}
    for number, (kept, scores) in enumerate(rounds):
        for axis, values in scores.axes().items():
            largest = values.max()
            parts = number + (values / (2 * largest) if largest > 0 else values)
            _place(found[axis], parts, axis, kept, teacher)
    return UnitScores(**found)


def _place(found: NDArray, values: NDArray, axis: str, kept: Kept, teacher: Architecture) -> None:
    """Writes the scores of the kept units to where those units are in the teacher."""
    if axis == "hidden":
        found[list(kept.hidden)] = values
        return
    for layer, row in enumerate(values):
        if axis == "expert_mlp":
            experts = kept.experts[layer] if kept.experts else range(teacher.experts)
            for place, expert in enumerate(experts):
                units = kept.expert_mlp[layer][place] if kept.expert_mlp else range(teacher.expert_mlp)
                found[layer, expert, list(units)] = row[place]
        else:
            found[layer, _units(axis, layer, kept, teacher)] = row


def _units(axis: str, layer: int, kept: Kept, teacher: Architecture) -> list[int]:
    match axis:
        case "heads":
            return list(kept.heads[layer])
        case "mlp":
            return list(kept.mlp[layer])
        case "experts":
            return list(kept.experts[layer]) if kept.experts else list(range(teacher.experts))
        case "kv_heads" if kept.kv_heads:
            return [group for [group] in kept.kv_heads[layer]]
        case "kv_heads" if teacher.heads_per_group == 1:
            return list(kept.heads[layer])
        case "kv_heads":
            return list(range(teacher.kv_heads))
    raise ValueError(f"{axis} is no axis of layers")
