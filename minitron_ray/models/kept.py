"""`Kept`: which of the teacher's units a student keeps; the whole difference between the two."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from minitron_ray.models.architecture import Architecture

Indices = tuple[int, ...]
Groups = tuple[Indices, ...]
"""Of each KV head of a student: the teacher's KV heads that it is the mean of."""
Blend = tuple[tuple[int, float], ...]
"""A head as a sum of the teacher's heads: (head, weight)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """0-indexed units of the teacher, each tuple of them sorted ascending.

    `heads`, `mlp` and the fields after them hold one entry for each *kept* layer, in the order of
    `layers`, all of one size. An empty tuple stands for all units as they are in the teacher. head_dim
    and vocabulary are never cut (paper §2).
    """

    layers: Indices
    hidden: Indices
    heads: tuple[Indices, ...]
    """Query heads. Each belongs to a teacher's KV head that is kept, equally many to each of the
    student's KV heads, so that it stays with the keys and values it was trained with."""
    mlp: tuple[Indices, ...] = ()
    """Empty also where a family has no MLP besides its experts."""
    kv_heads: tuple[Groups, ...] = ()
    """In ascending order, without overlap. Where each of the teacher's heads has its own keys and
    values, empty means those of `heads`."""
    experts: tuple[Indices, ...] = ()
    expert_mlp: tuple[tuple[Indices, ...], ...] = ()
    """Neurons of each kept expert."""
    merged_heads: tuple[tuple[Blend, ...], ...] = ()
    """What each kept head becomes in the matrices that make queries (and keys and values, where every
    head has its own); empty for the teacher's heads as they are (paper §2.3)."""

    @classmethod
    def whole(cls, teacher: Architecture) -> Self:
        """Everything: the cut that changes nothing."""
        return cls(
            layers=tuple(range(teacher.layers)),
            hidden=tuple(range(teacher.hidden)),
            heads=(tuple(range(teacher.heads)),) * teacher.layers,
            mlp=(tuple(range(teacher.mlp)),) * teacher.layers if teacher.mlp else (),
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`, also after a trip through JSON."""
        return cls(**{name: _tuples(units) for name, units in value.items()})

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON; what is empty is left out."""
        given = {name: getattr(self, name) for name in self.__slots__}
        return {name: _lists(units) for name, units in given.items() if units}

    def architecture(self, teacher: Architecture) -> Architecture:
        """The student's sizes. Raises ValueError where this is no selection of `teacher`'s units."""
        self.check(teacher)
        return teacher.with_sizes(
            layers=len(self.layers),
            hidden=len(self.hidden),
            heads=len(self.heads[0]),
            kv_heads=len(self.groups(teacher, 0)),
            mlp=len(self.mlp[0]) if self.mlp else None,
            experts=len(self.experts[0]) if self.experts else None,
            expert_mlp=len(self.expert_mlp[0][0]) if self.expert_mlp else None,
        )

    def groups(self, teacher: Architecture, layer: int) -> Groups:
        """The KV heads of the student's layer `layer`, each as the teacher's that it is the mean of."""
        if self.kv_heads:
            return self.kv_heads[layer]
        units = self.heads[layer] if teacher.heads_per_group == 1 else range(teacher.kv_heads)
        return tuple((unit,) for unit in units)

    def check(self, teacher: Architecture) -> None:
        """Raises ValueError naming the first axis whose indices do not fit `teacher`."""
        _check_indices("layers", self.layers, teacher.layers)
        _check_indices("hidden", self.hidden, teacher.hidden)
        self._check_rows("heads", self.heads, teacher.heads)
        if self.mlp:
            self._check_rows("mlp", self.mlp, teacher.mlp)
        if self.experts:
            self._check_rows("experts", self.experts, teacher.experts)
        if self.expert_mlp:
            self._check_expert_mlp(teacher)
        for position, layer in enumerate(self.layers):
            groups = self.groups(teacher, position)
            if len(groups) != len(self.groups(teacher, 0)):
                raise ValueError(
                    f"KV heads of layer {layer}: {len(groups)}, other layers have another number"
                )
            _check_groups(layer, groups, self.heads[position], teacher)
        if self.merged_heads:
            self._check_merged(teacher)

    def _check_rows(self, axis: str, rows: Sequence[Indices], size: int) -> None:
        self._check_count(axis, rows)
        for layer, row in zip(self.layers, rows, strict=True):
            _check_indices(f"{axis} of layer {layer}", row, size)
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"{axis} of layer {layer}: {len(row)} kept, other layers keep {len(rows[0])}"
                )

    def _check_count(self, axis: str, rows: Sequence[Any]) -> None:
        if len(rows) != len(self.layers):
            raise ValueError(f"{axis} of {len(rows)} layers kept, but {len(self.layers)} layers")

    def _check_expert_mlp(self, teacher: Architecture) -> None:
        self._check_count("expert_mlp", self.expert_mlp)
        width = len(self.expert_mlp[0][0])
        for position, layer in enumerate(self.layers):
            experts = len(self.experts[position]) if self.experts else teacher.experts
            rows = self.expert_mlp[position]
            if len(rows) != experts:
                raise ValueError(f"expert_mlp of layer {layer}: of {len(rows)} experts, {experts} are kept")
            for row in rows:
                _check_indices(f"expert_mlp of layer {layer}", row, teacher.expert_mlp)
                if len(row) != width:
                    raise ValueError(f"expert_mlp of layer {layer}: {len(row)} kept, others keep {width}")

    def _check_merged(self, teacher: Architecture) -> None:
        self._check_count("merged_heads", self.merged_heads)
        for position, layer in enumerate(self.layers):
            blends = self.merged_heads[position]
            if len(blends) != len(self.heads[position]):
                raise ValueError(
                    f"merged_heads of layer {layer}: {len(blends)}, but {len(self.heads[position])} heads"
                )
            if any(not 0 <= head < teacher.heads for blend in blends for head, _ in blend):
                raise ValueError(f"merged_heads of layer {layer}: a head outside 0..{teacher.heads - 1}")

    def then(self, inner: Kept, teacher: Architecture) -> Kept:
        """One selection for two cuts in a row: `inner` selects among the units that `self` keeps of `teacher`.

        Raises ValueError where the two are no single selection: a mean of KV heads of means of unequally
        many, or heads merged together with keys and values that the teacher's heads share.
        """
        between = self.architecture(teacher)
        if inner.merged_heads and between.heads_per_group == 1 < teacher.heads_per_group:
            raise ValueError("merged_heads: keys and values that the teacher's heads share can't be merged")
        composed = Kept(
            layers=_compose(self.layers, inner.layers),
            hidden=_compose(self.hidden, inner.hidden),
            heads=_each(self.heads, inner.heads, inner.layers),
            mlp=_each(self.mlp, inner.mlp, inner.layers),
            experts=_each(self.experts, inner.experts, inner.layers),
            expert_mlp=self._expert_mlp_then(inner),
            merged_heads=self._merged_then(inner),
        )
        groups = self._groups_then(inner, teacher, between)
        if groups == tuple(composed.groups(teacher, layer) for layer in range(len(inner.layers))):
            return composed
        return replace(composed, kv_heads=groups)

    def _groups_then(self, inner: Kept, teacher: Architecture, between: Architecture) -> tuple[Groups, ...]:
        composed = []
        for position, layer in enumerate(inner.layers):
            own, groups = self.groups(teacher, layer), inner.groups(between, position)
            if any(len({len(own[member]) for member in group}) > 1 for group in groups):
                raise ValueError(f"KV heads of layer {layer}: means of unequally many can't be merged again")
            composed.append(
                tuple(tuple(unit for member in group for unit in own[member]) for group in groups)
            )
        return tuple(composed)

    def _expert_mlp_then(self, inner: Kept) -> tuple[tuple[Indices, ...], ...]:
        if not self.expert_mlp:
            return inner.expert_mlp
        composed = []
        for position, layer in enumerate(inner.layers):
            outer = self.expert_mlp[layer]
            experts = inner.experts[position] if inner.experts else range(len(outer))
            rows = [outer[expert] for expert in experts]
            if inner.expert_mlp:
                rows = [
                    _compose(row, chosen)
                    for row, chosen in zip(rows, inner.expert_mlp[position], strict=True)
                ]
            composed.append(tuple(rows))
        return tuple(composed)

    def _merged_then(self, inner: Kept) -> tuple[tuple[Blend, ...], ...]:
        if not self.merged_heads and not inner.merged_heads:
            return ()
        composed = []
        for position, layer in enumerate(inner.layers):
            own = self.merged_heads[layer] if self.merged_heads else _plain(self.heads[layer])
            blends = inner.merged_heads[position] if inner.merged_heads else _plain(inner.heads[position])
            composed.append(tuple(_expand(blend, own) for blend in blends))
        return tuple(composed)


def _plain(heads: Indices) -> tuple[Blend, ...]:
    return tuple(((head, 1.0),) for head in heads)


def _expand(blend: Blend, own: Sequence[Blend]) -> Blend:
    """A sum of sums of the teacher's heads as one sum."""
    total: dict[int, float] = defaultdict(float)
    for unit, weight in blend:
        for head, share in own[unit]:
            total[head] += weight * share
    return tuple(total.items())


def _compose(outer: Sequence[int], inner: Sequence[int]) -> Indices:
    return tuple(outer[index] for index in inner)


def _each(outer: tuple[Indices, ...], inner: tuple[Indices, ...], layers: Indices) -> tuple[Indices, ...]:
    """`_compose` in each of the kept `layers`; empty means all."""
    if not outer:
        return inner
    if not inner:
        return tuple(outer[layer] for layer in layers)
    return tuple(_compose(outer[layer], row) for layer, row in zip(layers, inner, strict=True))


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _check_indices(what: str, indices: Indices, size: int) -> None:
    if not indices:
        raise ValueError(f"{what}: nothing kept")
    if any(left >= right for left, right in itertools.pairwise(indices)):
        raise ValueError(f"{what}: indices are not sorted ascending without repeats")
    if indices[0] < 0 or indices[-1] >= size:
        raise ValueError(f"{what}: indices {indices[0]}..{indices[-1]} outside 0..{size - 1}")


def _check_groups(layer: int, groups: Groups, heads: Indices, teacher: Architecture) -> None:
    members = tuple(unit for group in groups for unit in group)
    _check_indices(f"KV heads of layer {layer}", members, teacher.kv_heads)
    if not all(groups):
        raise ValueError(f"KV heads of layer {layer}: one is made of none of the teacher's")
    owner = {unit: number for number, group in enumerate(groups) for unit in group}
    counts = [0] * len(groups)
    for head in heads:
        group = owner.get(head // teacher.heads_per_group)
        if group is None:
            raise ValueError(
                f"heads of layer {layer}: head {head} is kept, its KV group {head // teacher.heads_per_group} "
                f"is not"
            )
        counts[group] += 1
    if len(set(counts)) != 1:
        raise ValueError(f"heads of layer {layer}: {counts} kept in the KV groups, must be equally many")
