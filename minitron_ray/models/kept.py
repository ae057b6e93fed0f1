"""`Kept`: which of the teacher's units a student keeps; the whole difference between the two."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from minitron_ray.models.architecture import Architecture

Indices = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """0-indexed units of the teacher, each tuple sorted ascending.

    `heads` and `mlp` hold one tuple for each *kept* layer, in the order of `layers`, all of one
    length. Every KV group keeps equally many query heads, so that a student's head stays with the
    keys and values it was trained with. KV heads, head_dim and vocabulary are never cut (paper §2).
    """

    layers: Indices
    hidden: Indices
    heads: tuple[Indices, ...]
    mlp: tuple[Indices, ...]

    @classmethod
    def whole(cls, teacher: Architecture) -> Self:
        """Everything: the cut that changes nothing."""
        return cls(
            layers=tuple(range(teacher.layers)),
            hidden=tuple(range(teacher.hidden)),
            heads=(tuple(range(teacher.heads)),) * teacher.layers,
            mlp=(tuple(range(teacher.mlp)),) * teacher.layers,
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`, also after a trip through JSON."""
        return cls(
            layers=tuple(value["layers"]),
            hidden=tuple(value["hidden"]),
            heads=tuple(tuple(row) for row in value["heads"]),
            mlp=tuple(tuple(row) for row in value["mlp"]),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {
            "layers": list(self.layers),
            "hidden": list(self.hidden),
            "heads": [list(row) for row in self.heads],
            "mlp": [list(row) for row in self.mlp],
        }

    def architecture(self, teacher: Architecture) -> Architecture:
        """The student's sizes. Raises ValueError where this is no selection of `teacher`'s units."""
        self.check(teacher)
        return teacher.with_sizes(
            layers=len(self.layers),
            hidden=len(self.hidden),
            heads=len(self.heads[0]),
            mlp=len(self.mlp[0]),
        )

    def check(self, teacher: Architecture) -> None:
        """Raises ValueError naming the first axis whose indices do not fit `teacher`."""
        _check_indices("layers", self.layers, teacher.layers)
        _check_indices("hidden", self.hidden, teacher.hidden)
        for axis, rows, size in (("heads", self.heads, teacher.heads), ("mlp", self.mlp, teacher.mlp)):
            if len(rows) != len(self.layers):
                raise ValueError(f"{axis} of {len(rows)} layers kept, but {len(self.layers)} layers")
            for layer, row in zip(self.layers, rows, strict=True):
                _check_indices(f"{axis} of layer {layer}", row, size)
                if len(row) != len(rows[0]):
                    raise ValueError(
                        f"{axis} of layer {layer}: {len(row)} kept, other layers keep {len(rows[0])}"
                    )
        for layer, row in zip(self.layers, self.heads, strict=True):
            _check_groups(layer, row, teacher)

    def then(self, inner: Kept) -> Kept:
        """One selection for two cuts in a row: `inner` selects among the units that `self` keeps."""
        return Kept(
            layers=_compose(self.layers, inner.layers),
            hidden=_compose(self.hidden, inner.hidden),
            heads=tuple(
                _compose(self.heads[layer], row) for layer, row in zip(inner.layers, inner.heads, strict=True)
            ),
            mlp=tuple(
                _compose(self.mlp[layer], row) for layer, row in zip(inner.layers, inner.mlp, strict=True)
            ),
        )


def _compose(outer: Sequence[int], inner: Sequence[int]) -> Indices:
    return tuple(outer[index] for index in inner)


def _check_indices(what: str, indices: Indices, size: int) -> None:
    if not indices:
        raise ValueError(f"{what}: nothing kept")
    if any(left >= right for left, right in itertools.pairwise(indices)):
        raise ValueError(f"{what}: indices are not sorted ascending without repeats")
    if indices[0] < 0 or indices[-1] >= size:
        raise ValueError(f"{what}: indices {indices[0]}..{indices[-1]} outside 0..{size - 1}")


def _check_groups(layer: int, row: Indices, teacher: Architecture) -> None:
    counts = [0] * teacher.kv_heads
    for head in row:
        counts[head // teacher.heads_per_group] += 1
    if len(set(counts)) != 1:
        raise ValueError(f"heads of layer {layer}: {counts} kept in the KV groups, must be equally many")
