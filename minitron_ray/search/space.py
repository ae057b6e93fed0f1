"""Every shape of a search space, counted, and inside the budget or not and why."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.fingerprint import digest
from minitron_ray.core.units import format_count
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.budget import Band
from minitron_ray.models.family import Family


class SizesLike(Protocol):
    """The sizes one axis may take (`core.units.Choices`)."""

    @property
    def values(self) -> tuple[int, ...]: ...
    @property
    def ratios(self) -> tuple[float, ...]: ...

    def sizes(self, hidden: int) -> tuple[int, ...]: ...


class SpaceLike(Protocol):
    """The section `search.space` of an experiment; None keeps the teacher's size."""

    @property
    def layers(self) -> SizesLike | None: ...
    @property
    def hidden(self) -> SizesLike | None: ...
    @property
    def heads(self) -> SizesLike | None: ...
    @property
    def mlp(self) -> SizesLike | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A student's shape. `kv_heads` is the teacher's."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int

    @property
    def id(self) -> str:
        """Ten hex digits of the digest of the shape: equal shapes have equal ids in every run."""
        return digest(
            {
                "layers": self.layers,
                "hidden": self.hidden,
                "heads": self.heads,
                "kv_heads": self.kv_heads,
                "mlp": self.mlp,
            }
        )[:10]

    def architecture(self, teacher: Architecture) -> Architecture:
        """The student as a network on paper."""
        return teacher.with_sizes(layers=self.layers, hidden=self.hidden, heads=self.heads, mlp=self.mlp)

    def shape_text(self) -> str:
        """For people: `24L 576H 9h 1024m`."""
        return f"{self.layers}L {self.hidden}H {self.heads}h {self.mlp}m"


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRow:
    """A shape of the space with its count and whether the search may propose it."""

    candidate: Candidate
    parameters: int
    non_embedding_parameters: int
    in_budget: bool
    reason: str | None
    """Why the search may not propose it; None where it may."""

    def row(self) -> dict[str, Any]:
        """A row of the table `candidates`."""
        shape = self.candidate
        return {
            "candidate_id": shape.id,
            "layers": shape.layers,
            "hidden": shape.hidden,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "mlp": shape.mlp,
            "parameters": self.parameters,
            "non_embedding_parameters": self.non_embedding_parameters,
            "in_budget": self.in_budget,
            "reason": self.reason,
        }


def enumerate_candidates(
    family: Family, teacher: Architecture, space: SpaceLike, band: Band
) -> list[CandidateRow]:
    """Every combination of sizes, in the order layers, hidden, heads, MLP.

    Raises ConfigError where no shape is inside the budget, naming what the space does reach.
    """
    rows = [_judge(family, teacher, shape, band) for shape in _shapes(teacher, space)]
    if not any(row.in_budget for row in rows):
        raise ConfigError(_out_of_reach(family, teacher, rows, band))
    return rows


def _shapes(teacher: Architecture, space: SpaceLike) -> list[Candidate]:
    for axis in ("layers", "hidden", "heads"):
        choices: SizesLike | None = getattr(space, axis)
        if choices is not None and choices.ratios:
            raise ConfigError(
                f"search.space.{axis}: a ratio to the hidden size is for mlp only; list sizes instead"
            )

    def sizes(choices: SizesLike | None, own: int, hidden: int = teacher.hidden) -> tuple[int, ...]:
        return (own,) if choices is None else choices.sizes(hidden)

    mlp = {hidden: sizes(space.mlp, teacher.mlp, hidden) for hidden in sizes(space.hidden, teacher.hidden)}
    return [
        Candidate(layers=layers, hidden=hidden, heads=heads, kv_heads=teacher.kv_heads, mlp=width)
        for layers, hidden, heads in itertools.product(
            sizes(space.layers, teacher.layers), mlp, sizes(space.heads, teacher.heads)
        )
        for width in mlp[hidden]
    ]


def _judge(family: Family, teacher: Architecture, shape: Candidate, band: Band) -> CandidateRow:
    arch = shape.architecture(teacher)
    total = family.parameters(arch)
    core = total - family.embedding_parameters(arch)
    reason = _above_teacher(shape, teacher) or "; ".join(family.problems(arch)) or _outside(total, core, band)
    return CandidateRow(
        candidate=shape,
        parameters=total,
        non_embedding_parameters=core,
        in_budget=reason is None,
        reason=reason,
    )


def _above_teacher(shape: Candidate, teacher: Architecture) -> str | None:
    for axis in ("layers", "hidden", "heads", "mlp"):
        if getattr(shape, axis) > getattr(teacher, axis):
            return f"{axis} {getattr(shape, axis)} is above the teacher's {getattr(teacher, axis)}"
    return None


def _outside(total: int, core: int, band: Band) -> str | None:
    distance = band.distance(total if band.count == "total" else core)
    if distance == 0:
        return None
    return f"{format_count(abs(distance))} {'above' if distance > 0 else 'below'} the budget"


def _out_of_reach(family: Family, teacher: Architecture, rows: Sequence[CandidateRow], band: Band) -> str:
    def counted(row: CandidateRow) -> int:
        return row.parameters if band.count == "total" else row.non_embedding_parameters

    def text(row: CandidateRow) -> str:
        return f"{format_count(counted(row))} ({row.candidate.shape_text()})"

    buildable = [
        row
        for row in rows
        if _above_teacher(row.candidate, teacher) is None
        and not family.problems(row.candidate.architecture(teacher))
    ]
    if not buildable:
        return (
            f"search.space: none of its {len(rows)} shapes can be cut from the teacher, e.g. {rows[0].reason}"
        )
    smallest, largest = min(buildable, key=counted), max(buildable, key=counted)
    nearest = min(buildable, key=lambda row: abs(band.distance(counted(row))))
    return (
        f"budget: no shape of search.space has {band.text()}; the space reaches {text(smallest)} to "
        f"{text(largest)}, nearest is {text(nearest)}; change budget.parameters or tolerance, or widen "
        f"search.space"
    )
