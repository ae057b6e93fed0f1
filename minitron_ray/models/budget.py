"""How large a student may be: bands on parameters, on bytes of memory, on operations a token, or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Self

import numpy as np

from minitron_ray.core.bounds import UNBOUNDED, Bounds, CountBounds
from minitron_ray.core.units import format_bytes, format_count

if TYPE_CHECKING:
    from numpy.typing import NDArray

Measure = Literal["parameters", "non_embedding_parameters", "memory_bytes", "flops_per_token"]
"""What a band bounds, by the column of the table `candidates`."""

_UNITS: Final[dict[Measure, str]] = {
    "parameters": "parameters",
    "non_embedding_parameters": "non-embedding parameters",
    "memory_bytes": "of memory",
    "flops_per_token": "FLOPs a token",
}
_KEYS: Final[dict[Measure, str]] = {
    "parameters": "budget.parameters",
    "non_embedding_parameters": "budget.parameters",
    "memory_bytes": "budget.memory",
    "flops_per_token": "budget.flops",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a model serves at a time; its memory and the operations of a token depend on it."""

    batch: int = 1
    """Sequences in the KV cache."""
    length: int
    """Tokens of each."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of weights and cache."""

    def text(self) -> str:
        """For people: `8 x 4096 tokens in bfloat16`."""
        return f"{self.batch} x {self.length} tokens in {self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Inclusive bounds on one measure."""

    low: int
    high: int
    measure: Measure = "parameters"

    @classmethod
    def of(cls, wanted: int | Bounds, tolerance: float = 0.05, measure: Measure = "parameters") -> Self:
        """Around a centre, or between bounds; `tolerance` holds for a centre that does not bring its own."""
        bounds = CountBounds(centre=wanted) if isinstance(wanted, int) else wanted
        low, high = bounds.ends(tolerance)
        return cls(low=low, high=high, measure=measure)

    @property
    def key(self) -> str:
        """Where an experiment file says it."""
        return _KEYS[self.measure]

    def distance(self, count: int) -> int:
        """How far `count` is above (positive) or below (negative) the band; 0 inside."""
        return max(count - self.high, 0) + min(count - self.low, 0)

    def relative_distance(self, count: int) -> float:
        """How far `count` is outside, as a share of the nearest end; 0 inside."""
        distance = self.distance(count)
        return abs(distance) / max(1, self.high if distance > 0 else self.low)

    def distances(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """`distance` of many."""
        return np.maximum(counts - self.high, 0) + np.minimum(counts - self.low, 0)

    def amount(self, count: int) -> str:
        """A count of this measure for people: `8.272B parameters`, `21.3 GiB of memory`."""
        number = format_bytes(count) if self.measure == "memory_bytes" else format_count(count)
        return f"{number} {_UNITS[self.measure]}"

    def outside(self, distance: int) -> str:
        """For people: `1.2M parameters above the budget`."""
        return f"{self.amount(abs(distance))} {'above' if distance > 0 else 'below'} the budget"

    def text(self) -> str:
        """For people: `85.5M to 94.5M parameters`, `at most 22.0 GiB of memory`."""
        if self.low == 0:
            return f"at most {self.amount(self.high)}"
        if self.high == UNBOUNDED:
            return f"at least {self.amount(self.low)}"
        number = format_bytes if self.measure == "memory_bytes" else format_count
        return f"{number(self.low)} to {self.amount(self.high)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bands that all hold at once, and the load that memory and operations are counted for."""

    bands: tuple[Band, ...]
    load: Load

    @classmethod
    def on(cls, *bands: Band, load: Load | None = None) -> Self:
        """`load` may be left out where no band asks for it."""
        assert load is not None or all(band.measure.endswith("parameters") for band in bands)
        return cls(bands=bands, load=load or Load(length=1))

    def violation(self, counts: Mapping[str, int]) -> float:
        """The sum of the relative distances to all bands, counts by measure; 0 inside all."""
        return sum(band.relative_distance(counts[band.measure]) for band in self.bands)

    def text(self) -> str:
        """For people: `7.800B to 8.500B parameters, at most 22.0 GiB of memory (8 x 4096 tokens in bfloat16)`."""
        told = ", ".join(band.text() for band in self.bands)
        measures = {band.measure for band in self.bands}
        return f"{told} ({self.load.text()})" if measures & {"memory_bytes", "flops_per_token"} else told
