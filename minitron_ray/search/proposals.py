"""`ShapeProposals`: the search space in Optuna's terms."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from minitron_ray.models.budget import Band
from minitron_ray.search.space import SPACE_AXES, CandidateRow, SpaceLike

if TYPE_CHECKING:
    from optuna import Trial

Values = tuple[int, ...] | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ShapeProposals:
    """One parameter an axis that has more than one size; `mlp_ratio` where it is a multiple of hidden."""

    axes: tuple[tuple[str, Values], ...]
    feasible: tuple[str, ...]
    """Candidate ids inside the budget, in the order of enumeration."""
    of_values: dict[tuple[Any, ...], tuple[str | None, float]]
    """Values on the axes to candidate id (None where infeasible) and relative distance to the budget."""

    @classmethod
    def of(cls, rows: list[CandidateRow], space: SpaceLike, band: Band, teacher_hidden: int) -> Self:
        """From the enumerated space."""
        axes = tuple(
            (name, values) for name, values in _axes(space, teacher_hidden).items() if len(values) > 1
        )
        of_values: dict[tuple[Any, ...], tuple[str | None, float]] = {}
        for row in rows:
            shape = row.candidate
            named: dict[str, int | float] = {axis: getattr(shape, axis) for axis in SPACE_AXES}
            if space.mlp is not None and space.mlp.ratios:
                ratios = [r for r in space.mlp.ratios if max(1, round(r * shape.hidden)) == shape.mlp]
                named["mlp_ratio"] = ratios[0]
            counted = row.parameters if band.count == "total" else row.non_embedding_parameters
            distance = abs(band.distance(counted)) / band.high
            infeasible = max(distance, 1e-9)  # a shape that cannot be built may lie inside the band
            key = tuple(named[name] for name, _ in axes)
            of_values[key] = (shape.id, 0.0) if row.in_budget else (None, infeasible)
        feasible = tuple(row.candidate.id for row in rows if row.in_budget)
        return cls(axes=axes, feasible=feasible, of_values=of_values)

    def __call__(self, trial: Trial, /) -> None:
        for name, values in self.axes:
            steps = {b - a for a, b in pairwise(values)}
            if len(steps) == 1 and all(isinstance(value, int) for value in values):
                trial.suggest_int(name, int(values[0]), int(values[-1]), step=int(steps.pop()))
            else:
                trial.suggest_categorical(name, values)

    def candidate_id(self, parameters: dict[str, Any]) -> str | None:
        return self._found(parameters)[0]

    def violation(self, parameters: dict[str, Any]) -> float:
        return self._found(parameters)[1]

    def parameters(self, candidate_id: str) -> dict[str, Any]:
        key = next(key for key, (found, _) in self.of_values.items() if found == candidate_id)
        return {name: value for (name, _), value in zip(self.axes, key, strict=True)}

    def _found(self, parameters: dict[str, Any]) -> tuple[str | None, float]:
        # Two ratios may round to one size; the shape is then known under the first of them.
        return self.of_values.get(tuple(parameters[name] for name, _ in self.axes), (None, 1e-9))


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
