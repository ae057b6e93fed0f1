"""What a source of text must offer, and what it hands over."""

from __future__ import annotations

from abc import abstractmethod
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


class Source(Plugin):
    """A named place of text or tokens. `base` is the experiment file's folder, for relative paths."""

    @abstractmethod
    def identity(self, base: Path, cache: Cache) -> dict[str, Any]:
        """Digests of the content (never paths or times), equal on every machine that reads the same.

        Fetches what is not at hand. Raises ConfigError where the named content is not there and
        EnvironmentFailure where it can't be fetched.
        """


class TextSource(Source):
    """A source of documents, which are tokenised and packed."""

    @abstractmethod
    def documents(self, base: Path, cache: Cache) -> Iterator[Document]:
        """Every document once, in an order that depends on nothing but the content's names."""


class TokenSource(Source):
    """A source of rows that are token ids already, used as they stand and in file order."""

    @abstractmethod
    def sequences(self, base: Path, cache: Cache) -> Iterator[np.ndarray]:
        """Every row, a one-dimensional integer array, in file order."""
