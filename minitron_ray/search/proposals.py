"""`ShapeProposals`: the search space in Optuna's terms."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from minitron_ray.search.space import SPACE_AXES, Candidate, CandidateRow, SpaceLike

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

Values = tuple[int, ...] | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ShapeProposals:
    """One parameter an axis that has more than one size; `mlp_ratio` where it is a multiple of hidden."""

    axes: tuple[tuple[str, Values], ...]
    feasible: tuple[str, ...]
    """Candidate ids inside the budget, in the order of enumeration."""
    values: tuple[tuple[int | float, ...], ...]
    """Of each feasible candidate, its value on every axis."""

    @classmethod
    def of(cls, rows: Iterable[CandidateRow], space: SpaceLike, teacher_hidden: int) -> Self:
        """From the enumerated space."""
        axes = tuple(
            (name, values) for name, values in _axes(space, teacher_hidden).items() if len(values) > 1
        )
        ratios = space.mlp.ratios if space.mlp is not None else ()
        shapes = [row.candidate for row in rows if row.in_budget]
        return cls(
            axes=axes,
            feasible=tuple(shape.id for shape in shapes),
            values=tuple(tuple(_value(shape, name, ratios) for name, _ in axes) for shape in shapes),
        )

    def __call__(self, trial: Trial, /) -> None:
        """Suggest a value on every axis."""
        for name, values in self.axes:
            if (step := _even_step(values)) is not None:
                trial.suggest_int(name, int(values[0]), int(values[-1]), step=step)
            else:
                trial.suggest_categorical(name, values)

    def distributions(self) -> dict[str, BaseDistribution]:
        """What `__call__` suggests from, for trials that are written down rather than asked for."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        return {
            name: CategoricalDistribution(values)
            if (step := _even_step(values)) is None
            else IntDistribution(int(values[0]), int(values[-1]), step=step)
            for name, values in self.axes
        }

    def parameters(self, candidate_id: str) -> dict[str, Any]:
        """The values that suggest this candidate. Raises KeyError where it is not feasible."""
        values = self.values[self._places[candidate_id]]
        return {name: value for (name, _), value in zip(self.axes, values, strict=True)}

    def nearest(self, parameters: Mapping[str, Any], among: Collection[str]) -> str:
        """Of the feasible candidates `among`, the one whose sizes are the fewest steps away, each axis
        taken as one long; the first of several."""
        wanted = np.array([self._positions[name][parameters[name]] for name, _ in self.axes])
        distances = np.abs(self._grid - wanted).sum(axis=1)
        order = np.argsort(distances.round(9), kind="stable")
        return next(self.feasible[place] for place in order if self.feasible[place] in among)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {candidate_id: place for place, candidate_id in enumerate(self.feasible)}

    @cached_property
    def _positions(self) -> dict[str, dict[int | float, float]]:
        """Of each axis, the place of a value between 0 and 1."""
        return {
            name: {value: step / (len(values) - 1) for step, value in enumerate(values)}
            for name, values in self.axes
        }

    @cached_property
    def _grid(self) -> NDArray:
        """The positions of the feasible candidates, (candidates, axes)."""
        positions = [self._positions[name] for name, _ in self.axes]
        return np.array([[p[v] for p, v in zip(positions, row, strict=True)] for row in self.values])


def _value(shape: Candidate, axis: str, ratios: tuple[float, ...]) -> int | float:
    if axis != "mlp_ratio":
        size: int = getattr(shape, axis)
        return size
    # Two ratios may round to one size; the shape is then known under the first of them.
    return next(ratio for ratio in ratios if max(1, round(ratio * shape.hidden)) == shape.mlp)


def _even_step(values: Values) -> int | None:
    """The distance between neighbours where all are whole and equally far apart."""
    steps = {b - a for a, b in pairwise(values)}
    whole = all(isinstance(value, int) for value in values)
    return int(steps.pop()) if whole and len(steps) == 1 else None


def _axes(space: SpaceLike, teacher_hidden: int) -> dict[str, Values]:
    axes: dict[str, Values] = {}
    for name in SPACE_AXES:
        choices = getattr(space, name)
        if choices is not None and name != "mlp":
            axes[name] = choices.sizes(teacher_hidden)
    if space.mlp is not None:
        if space.mlp.ratios:
            axes["mlp_ratio"] = space.mlp.ratios
        else:
            axes["mlp"] = space.mlp.values
    return axes
