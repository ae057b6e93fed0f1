"""Every shape of a search space, counted, and inside the budget or not and why."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.architecture import CUT_AXES, Architecture
from minitron_ray.models.budget import Band, Limits
from minitron_ray.models.counting import Column, Counts, count
from minitron_ray.models.family import Family
from minitron_ray.search.selection import PLAIN, CutRules
from minitron_ray.search.serving import SERVED_AXES, Serving
from minitron_ray.search.shape import Candidate, Refusals, check_axes, completed

SPACE_AXES: Final = ("layers", "hidden", "heads", "kv_heads", "experts", "expert_mlp", "mlp")
"""In the order of enumeration, the first changing slowest; the MLP may depend on the hidden size."""


MOST_SHAPES: Final = 500_000
"""Of a space: more take gigabytes and a minute to list, and a search tries some dozens."""


class SizesLike(Protocol):
    """The sizes one axis may take (`core.units.Choices`)."""

    @property
    def values(self) -> tuple[int, ...]: ...
    @property
    def ratios(self) -> tuple[float, ...]: ...

    def sizes(self, hidden: int) -> tuple[int, ...]: ...


class SpaceLike(Protocol):
    """The section `search.space` of an experiment; None keeps the teacher's size (see `shape_of`)."""

    @property
    def layers(self) -> SizesLike | None: ...
    @property
    def hidden(self) -> SizesLike | None: ...
    @property
    def heads(self) -> SizesLike | None: ...
    @property
    def kv_heads(self) -> SizesLike | None: ...
    @property
    def mlp(self) -> SizesLike | None: ...
    @property
    def experts(self) -> SizesLike | None: ...
    @property
    def expert_mlp(self) -> SizesLike | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRow:
    """A shape of the space with its counts and whether the search may propose it."""

    candidate: Candidate
    parameters: int
    non_embedding_parameters: int
    memory_bytes: int
    """Weights and KV cache for the load of the budget."""
    flops_per_token: int
    """Of a forward pass over as many tokens as the budget's load has."""
    in_budget: bool
    reason: str | None
    """Why the search may not propose it; None where it may."""

    def row(self) -> dict[str, Any]:
        """A row of the table `candidates`."""
        shape = self.candidate
        return {
            "candidate_id": shape.id,
            **{axis: getattr(shape, axis) for axis in CUT_AXES},
            "parameters": self.parameters,
            "non_embedding_parameters": self.non_embedding_parameters,
            "memory_bytes": self.memory_bytes,
            "flops_per_token": self.flops_per_token,
            "in_budget": self.in_budget,
            "reason": self.reason,
        }


def enumerate_candidates(
    family: Family,
    teacher: Architecture,
    space: SpaceLike,
    limits: Limits,
    rules: CutRules = PLAIN,
    serving: Serving | None = None,
) -> list[CandidateRow]:
    """Every combination of sizes, in the order of SPACE_AXES.

    A shape that cannot be cut or built says so first, then one that cannot be served, then one that is
    outside the budget. Raises ConfigError where the space names an axis that the family does not have,
    has more than MOST_SHAPES shapes, or where none is left, naming what the space does reach.
    """
    check_axes(family, [axis for axis in SPACE_AXES if getattr(space, axis) is not None], "search.space")
    _check_count(teacher, space)
    named = completed(teacher, _sizes(teacher, space), rules)
    shapes = len(named["mlp"])
    sizes = {axis: np.full(shapes, getattr(teacher, axis), dtype=np.int64) for axis in CUT_AXES} | named
    counts = count(family, teacher, sizes, limits.load)
    refused = Refusals(family, teacher, rules).of_many(sizes)
    unserved = _unserved(sizes, teacher.head_dim, serving)
    reasons = _first(_first(refused, unserved), _outside(counts, limits))
    rows = [
        CandidateRow(
            candidate=Candidate(
                layers=layers,
                hidden=hidden,
                heads=heads,
                kv_heads=kv_heads,
                mlp=mlp,
                experts=experts,
                expert_mlp=expert_mlp,
            ),
            parameters=parameters,
            non_embedding_parameters=core,
            memory_bytes=memory,
            flops_per_token=flops,
            in_budget=reason is None,
            reason=reason,
        )
        for layers, hidden, heads, kv_heads, mlp, experts, expert_mlp, parameters, core, memory, flops, reason in zip(
            *(sizes[axis].tolist() for axis in CUT_AXES),
            *(column.tolist() for column in counts),
            reasons.tolist(),
            strict=True,
        )
    ]
    if not any(row.in_budget for row in rows):
        raise ConfigError(_out_of_reach(rows, refused, unserved, limits))
    return rows


def _check_count(teacher: Architecture, space: SpaceLike) -> None:
    """Before they are listed. Raises ConfigError."""
    chosen = {axis: choices for axis in SPACE_AXES if (choices := getattr(space, axis)) is not None}
    counts = {axis: len(choices.sizes(teacher.hidden)) for axis, choices in chosen.items()}
    if (shapes := math.prod(counts.values())) > MOST_SHAPES:
        told = " x ".join(f"{count} {axis}" for axis, count in counts.items())
        raise ConfigError(
            f"search.space: {told} are {shapes:,} shapes, more than {MOST_SHAPES:,}; take larger steps, above all of "
            f"{max(counts, key=counts.__getitem__)}"
        )


def _sizes(teacher: Architecture, space: SpaceLike) -> dict[str, Column]:
    """Of every combination, the size on each axis that the space names and on the MLP."""
    fixed: dict[str, tuple[int, ...]] = {}
    for axis in SPACE_AXES:
        choices: SizesLike | None = getattr(space, axis)
        if choices is None or axis == "mlp":
            continue
        fixed[axis] = choices.values
    combinations = np.array(list(itertools.product(*fixed.values())), dtype=np.int64)
    mlps: list[tuple[int, ...]]
    if space.mlp is None:
        mlps = [(teacher.mlp,)] * len(combinations)
    elif "hidden" in fixed:
        widths = {hidden: space.mlp.sizes(hidden) for hidden in fixed["hidden"]}
        mlps = [widths[hidden] for hidden in combinations[:, list(fixed).index("hidden")].tolist()]
    else:
        mlps = [space.mlp.sizes(teacher.hidden)] * len(combinations)
    spread = np.repeat(np.arange(len(combinations)), [len(mlp) for mlp in mlps])
    columns = {axis: combinations[spread, place] for place, axis in enumerate(fixed)}
    return columns | {"mlp": np.array([size for mlp in mlps for size in mlp], dtype=np.int64)}


def _first(reasons: NDArray[np.object_], others: NDArray[np.object_]) -> NDArray[np.object_]:
    """Of each shape the reason, or where it has none, the other one."""
    return np.where([reason is None for reason in reasons], others, reasons)


def _unserved(sizes: Mapping[str, Column], head_dim: int, serving: Serving | None) -> NDArray[np.object_]:
    """Why shapes cannot be served: the first of SERVED_AXES whose size does not fit."""
    reasons = np.full(len(sizes["layers"]), None, dtype=object)
    for axis in reversed(SERVED_AXES) if serving is not None else ():
        assert serving is not None
        found, places = np.unique(sizes[axis], return_inverse=True)
        problems = np.empty(len(found), dtype=object)
        problems[:] = [serving.problem(axis, size, head_dim) for size in found.tolist()]
        reasons = _first(problems[places], reasons)
    return reasons


def _outside(counts: Counts, limits: Limits) -> NDArray[np.object_]:
    """How far shapes are outside each band that they are outside of."""
    reasons = np.full(len(counts.parameters), None, dtype=object)
    for band in limits.bands:
        distances = band.distances(getattr(counts, band.measure))
        for place in np.flatnonzero(distances).tolist():
            told = band.outside(int(distances[place]))
            reasons[place] = told if reasons[place] is None else f"{reasons[place]}; {told}"
    return reasons


def _out_of_reach(
    rows: Sequence[CandidateRow],
    refused: NDArray[np.object_],
    unserved: NDArray[np.object_],
    limits: Limits,
) -> str:
    buildable = [row for row, reason in zip(rows, refused, strict=True) if reason is None]
    if not buildable:
        return (
            f"search.space: none of its {len(rows)} shapes can be cut from the teacher, e.g. {rows[0].reason}"
        )
    served = [row for row, *reasons in zip(rows, refused, unserved, strict=True) if reasons == [None, None]]
    if not served:
        return (
            f"search.serving: none of the {len(buildable)} shapes that can be cut is served, e.g. "
            f"{buildable[0].candidate.shape_text()}: {buildable[0].reason}; add sizes to search.space or "
            f"remove the rule"
        )
    reached = [(band, _reached(served, band)) for band in limits.bands]
    out = [(band, text) for band, (inside, text) in reached if not inside]
    nearest = min(served, key=lambda row: limits.violation(_measured(row)))
    amounts = ", ".join(band.amount(getattr(nearest, band.measure)) for band in limits.bands)
    told = "the space reaches " + " and ".join(text for _, text in out)
    if not out:
        told = "each is reached, but not by one shape together"
    keys = " or ".join(dict.fromkeys(band.key for band, _ in out or reached))
    return (
        f"budget: no shape of search.space has {limits.text()}; {told}, nearest is "
        f"{amounts} ({nearest.candidate.shape_text()}); change {keys}, or widen search.space"
    )


def _reached(rows: Sequence[CandidateRow], band: Band) -> tuple[bool, str]:
    """Whether a shape is inside the band, and what the space reaches."""

    def counted(row: CandidateRow) -> int:
        found: int = getattr(row, band.measure)
        return found

    def text(row: CandidateRow) -> str:
        return f"{band.amount(counted(row))} ({row.candidate.shape_text()})"

    inside = any(band.distance(counted(row)) == 0 for row in rows)
    return inside, f"{text(min(rows, key=counted))} to {text(max(rows, key=counted))}"


def _measured(row: CandidateRow) -> dict[str, int]:
    return {name: getattr(row, name) for name in Counts._fields}


__all__ = ["SPACE_AXES", "Candidate", "CandidateRow", "SizesLike", "SpaceLike", "enumerate_candidates"]
