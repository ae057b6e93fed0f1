"""What a source of text must offer, and what it hands over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minitron_ray.core.kinds import Plugin

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from minitron_ray.results.cache import Cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text, and where it was found (for messages), such as `guide/use.txt` or `rows.jsonl:7`."""

    text: str
    origin: str


class Shard(ABC):
    """A run of a source's documents that one task tokenises. Small, and picklable."""

    @property
    @abstractmethod
    def identity(self) -> Any:
        """JSON values that say which run of the source's documents it is."""

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Bytes as stored; None where only reading it would tell."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document of the run once, in order."""


class Source(Plugin):
    """A named place of text or tokens. `base` is the experiment file's folder, for relative paths."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is called in tables."""

    @property
    def bounded(self) -> bool:
        """Whether no more is read than a run needs, as there may be more than any disk holds."""
        return False

    @property
    def by_content(self) -> bool:
        """Whether `identity` is the content's; else it is the listing of where the text is kept."""
        return True

    @property
    def sources(self) -> tuple[Source, ...]:
        """What takes turns in it: itself, or the parts of a mixture, none of them mixed."""
        return (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """Each one's share of the sequences, above 0; their sum is 1."""
        return (1.0,)

    @abstractmethod
    def identity(self, base: Path, cache: Cache) -> dict[str, Any]:
        """Digests of the content (never paths or times), equal on every machine that reads the same.

        Of what an object store keeps, which is not read to be named, the listing: names, sizes and times.
        Fetches what is not at hand. Raises ConfigError where the named content is not there and
        EnvironmentFailure where it can't be fetched.
        """


class TextSource(Source):
    """A source of documents, which are tokenised and packed."""

    @abstractmethod
    def shards(self, base: Path, cache: Cache) -> Iterator[Shard]:
        """Every document once, in an order that depends on nothing but the content's names, in runs that
        depend on nothing else either."""

    def documents(self, base: Path, cache: Cache) -> Iterator[Document]:
        """The same, one after another."""
        for shard in self.shards(base, cache):
            yield from shard.documents()


class TokenSource(Source):
    """A source of rows that are token ids already, used as they stand and in file order."""

    @abstractmethod
    def sequences(self, base: Path, cache: Cache) -> Iterator[np.ndarray]:
        """Every row, a one-dimensional integer array, in file order."""


class MixedSource(Source):
    """Several sources, whose sequences take turns."""

    @property
    @abstractmethod
    def sources(self) -> tuple[Source, ...]: ...

    @property
    @abstractmethod
    def weights(self) -> tuple[float, ...]: ...
