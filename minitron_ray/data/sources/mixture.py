"""Several sources in given shares, sequence by sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from minitron_ray.core.kinds import Section, one_of
from minitron_ray.data.source import MixedSource, Source

if TYPE_CHECKING:
    from pathlib import Path

    from minitron_ray.results.cache import Cache

    OtherSource: TypeAlias = Source
else:
    OtherSource = one_of("minitron_ray.data.sources", without=("mixture",))


class Part(Section):
    """One source of the mixture."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Its share of the tokens, relative to the other parts' weights."""
    source: OtherSource
    """Any source but a mixture: a mixture of mixtures is one mixture."""


class Mixture(MixedSource):
    """Sequences of several sources, taking turns by weight from the first one on, so that calibration,
    validation and training have the same shares. It ends where the first of them has no more: nothing is
    repeated, as what is repeated would be in validation and in training."""

    kind: Literal["mixture"] = "mixture"
    parts: Annotated[tuple[Part, ...], Field(min_length=2)]

    @property
    def title(self) -> str:
        return f"mixture of {len(self.parts)}"

    @property
    def bounded(self) -> bool:
        """Where one of them is: the others are then read as far as their shares go."""
        return any(source.bounded for source in self.sources)

    @property
    def by_content(self) -> bool:
        return all(source.by_content for source in self.sources)

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(part.source for part in self.parts)

    @property
    def weights(self) -> tuple[float, ...]:
        total = sum(part.weight for part in self.parts)
        return tuple(part.weight / total for part in self.parts)

    def identity(self, base: Path, cache: Cache) -> dict[str, Any]:
        parts = zip(self.sources, self.weights, strict=True)
        return {"parts": [{"weight": weight, **source.identity(base, cache)} for source, weight in parts]}
