"""`Band`: how many parameters a student may have."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Literal, Protocol, Self

from minitron_ray.core.units import format_count
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family

Counting = Literal["total", "non_embedding"]


class RangeLike(Protocol):
    """A range of counts (`core.units.CountRange`)."""

    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Inclusive bounds on a count of parameters."""

    low: int
    high: int
    count: Counting = "total"

    @classmethod
    def of(cls, parameters: int | RangeLike, tolerance: float = 0.05, count: Counting = "total") -> Self:
        """A centre with a relative half-width, or a range, which `tolerance` does not widen."""
        if not isinstance(parameters, int):
            return cls(low=parameters.low, high=parameters.high, count=count)
        width = parameters * Decimal(str(tolerance))
        return cls(
            low=int((parameters - width).to_integral_value(ROUND_CEILING)),
            high=int((parameters + width).to_integral_value(ROUND_FLOOR)),
            count=count,
        )

    def counted(self, arch: Architecture, family: Family) -> int:
        """The count of `arch` that this band is about."""
        return family.parameters(arch) if self.count == "total" else family.non_embedding_parameters(arch)

    def contains(self, arch: Architecture, family: Family) -> bool:
        """Whether `arch` is inside."""
        return self.distance(self.counted(arch, family)) == 0

    def distance(self, count: int) -> int:
        """How far `count` is above (positive) or below (negative) the band; 0 inside."""
        return max(count - self.high, 0) + min(count - self.low, 0)

    def text(self) -> str:
        """For people: `85.5M to 94.5M parameters`."""
        kind = "" if self.count == "total" else "non-embedding "
        return f"{format_count(self.low)} to {format_count(self.high)} {kind}parameters"
