"""Every shape of a search space, counted, and inside the budget or not and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.units import format_count
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.budget import Band
from minitron_ray.models.family import Family
from minitron_ray.search.selection import PLAIN, CutRules
from minitron_ray.search.shape import Candidate, Refusals, check_axes, shape_of

SPACE_AXES: Final = ("layers", "hidden", "heads", "kv_heads", "experts", "expert_mlp", "mlp")
"""In the order of enumeration, the first changing slowest; the MLP may depend on the hidden size."""


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
            "experts": shape.experts,
            "expert_mlp": shape.expert_mlp,
            "parameters": self.parameters,
            "non_embedding_parameters": self.non_embedding_parameters,
            "in_budget": self.in_budget,
            "reason": self.reason,
        }


def enumerate_candidates(
    family: Family, teacher: Architecture, space: SpaceLike, band: Band, rules: CutRules = PLAIN
) -> list[CandidateRow]:
    """Every combination of sizes, in the order of SPACE_AXES.

    Raises ConfigError where the space names an axis that the family does not have, or where no shape
    is inside the budget, naming what the space does reach.
    """
    check_axes(family, [axis for axis in SPACE_AXES if getattr(space, axis) is not None], "search.space")
    refusals = Refusals(family, teacher, rules)
    rows = [
        _judge(family, refusals, shape, shape.architecture(teacher), band)
        for shape in _shapes(teacher, space, rules)
    ]
    if not any(row.in_budget for row in rows):
        raise ConfigError(_out_of_reach(refusals, rows, band))
    return rows


def _shapes(teacher: Architecture, space: SpaceLike, rules: CutRules) -> Iterator[Candidate]:
    fixed: dict[str, tuple[int, ...]] = {}
    for axis in SPACE_AXES:
        choices: SizesLike | None = getattr(space, axis)
        if choices is None or axis == "mlp":
            continue
        if choices.ratios:
            raise ConfigError(
                f"search.space.{axis}: a ratio to the hidden size is for mlp only; list sizes instead"
            )
        fixed[axis] = choices.values
    widths = {
        hidden: (teacher.mlp,) if space.mlp is None else space.mlp.sizes(hidden)
        for hidden in fixed.get("hidden", (teacher.hidden,))
    }
    for sizes in itertools.product(*fixed.values()):
        named = dict(zip(fixed, sizes, strict=True))
        for mlp in widths[named.get("hidden", teacher.hidden)]:
            yield shape_of(teacher, named | {"mlp": mlp}, rules)


def _judge(
    family: Family, refusals: Refusals, shape: Candidate, arch: Architecture, band: Band
) -> CandidateRow:
    total = family.parameters(arch)
    core = total - family.embedding_parameters(arch)
    reason = refusals.of(shape, arch) or _outside(total, core, band)
    return CandidateRow(
        candidate=shape,
        parameters=total,
        non_embedding_parameters=core,
        in_budget=reason is None,
        reason=reason,
    )


def _outside(total: int, core: int, band: Band) -> str | None:
    distance = band.distance(total if band.count == "total" else core)
    if distance == 0:
        return None
    return f"{format_count(abs(distance))} {'above' if distance > 0 else 'below'} the budget"


def _out_of_reach(refusals: Refusals, rows: Sequence[CandidateRow], band: Band) -> str:
    def counted(row: CandidateRow) -> int:
        return row.parameters if band.count == "total" else row.non_embedding_parameters

    def text(row: CandidateRow) -> str:
        return f"{format_count(counted(row))} ({row.candidate.shape_text()})"

    buildable = [row for row in rows if refusals.of(row.candidate) is None]
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


__all__ = ["SPACE_AXES", "Candidate", "CandidateRow", "SizesLike", "SpaceLike", "enumerate_candidates"]
