"""`Task`: what a file of `tasks/` provides, a measure of how good a network is; and the examples it needs.

Examples are made once, where the files are, and are small and picklable: workers get them as they are
and run ranges of them. Each example has one value, so that a split over workers leaves no trace.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minitron_ray.core.kinds import Plugin

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Token ids to run, int64 (rows, tokens), and what else is known of them to whoever judges the output."""

    ids: NDArray
    notes: Any = None
    separator: int | None = None
    """As in `Headless`; None for rows that are one text each."""


class Examples(Protocol):
    """Numbered from 0."""

    def __len__(self) -> int: ...

    def batch(self, start: int, stop: int) -> Batch:
        """The examples from `start` up to and without `stop`, as one batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Examples that are packed sequences: those of a token store with the numbers `indices`."""

    read: Callable[[NDArray], NDArray]
    """Token ids, int64 (n, tokens), of the sequences with these numbers; `TokenStore.sequences`."""
    indices: tuple[int, ...]
    separator: int | None = None
    """The id that ends a document, where documents are apart."""

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, start: int, stop: int) -> Batch:
        ids = self.read(np.asarray(self.indices[start:stop], dtype=np.int64))
        return Batch(ids=ids, separator=self.separator)


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What examples may be made of."""

    calibration: Sequences
    teacher: Path
    """The teacher's folder, for its tokenizer and config."""
    base: Path
    """The experiment file's folder, at which relative paths start."""


class Task(Plugin):
    """A downstream measure, the larger the better; its value is the mean over the examples."""

    @property
    @abstractmethod
    def label(self) -> str:
        """For tables: the kind, and what tells it from others of the kind."""

    @abstractmethod
    def examples(self, material: Material) -> Examples:
        """All of them. Raises ConfigError for files that are missing or wrong, by line."""

    @abstractmethod
    def values(self, hidden: Tensor, batch: Batch, head: Tensor, softcap: float | None = None) -> NDArray:
        """One value an example of the batch, float64 (examples,).

        `hidden` is what a network made of `batch.ids`, final hidden states (rows, tokens, hidden);
        `head` the LM head's weight (vocabulary, hidden); `softcap` the c of logits that are capped as
        c * tanh(logits / c).
        """

    def inputs(self, base: Path) -> dict[str, Any]:
        """Digests of the files it reads, for fingerprints. Raises ConfigError where one is missing."""
        return {}
