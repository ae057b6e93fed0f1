"""From documents to rows of one length, and whose row is next where there are several sources.

Neither depends on how documents come: one by one, or a shard at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Group:
    """Some documents' token ids, one after another, and where each ends: int64, ascending, the last the
    length of `ids`."""

    ids: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[np.ndarray]) -> Group:
        return cls(np.concatenate(documents), np.cumsum([len(ids) for ids in documents], dtype=np.int64))


class Rows:
    """Rows of `length` tokens, cut out of documents without a gap; the stream is read as rows are asked for.

    With a `limit` it ends behind the document that fills as many rows.
    """

    def __init__(self, groups: Iterable[Group], length: int, limit: int | None = None) -> None:
        self._groups: Iterator[Group] = iter(groups)
        self._length = length
        self._room = None if limit is None else limit * length
        self._held: deque[np.ndarray] = deque()
        self._ends: deque[np.ndarray] = deque()
        self._pulled = self._documents_pulled = 0
        self._given = self._documents_passed = 0

    @property
    def given(self) -> int:
        """Rows that were taken."""
        return self._given

    def ready(self, rows: int) -> int:
        """How many of the next `rows` there are; reads on until it is known."""
        while self._pulled < (self._given + rows) * self._length and self._pull():
            pass
        if self._room is not None:
            rows = min(rows, self._room // self._length - self._given)
        return min(rows, self._pulled // self._length - self._given)

    def take(self, rows: int) -> np.ndarray:
        """The next rows, uint32 (rows, length); fewer at the end."""
        rows = self.ready(rows)
        flat = np.empty(rows * self._length, dtype=np.uint32)
        filled = 0
        while filled < len(flat):
            first = self._held.popleft()
            piece = first[: len(flat) - filled]
            flat[filled : filled + len(piece)] = piece
            filled += len(piece)
            if len(piece) < len(first):
                self._held.appendleft(first[len(piece) :])
        self._given += rows
        while self._ends and self._ends[0][-1] < self._given * self._length:
            self._documents_passed += len(self._ends.popleft())
        return flat.reshape(rows, self._length)

    def counts(self) -> dict[str, int]:
        """`documents` that were begun, `sequences` and `tokens` taken, and the `dropped` rest of those
        documents. Of a stream that was taken whole, documents behind its last row count as begun."""
        if self.ready(1) == 0:
            documents, read = self._documents_pulled, self._pulled
        else:
            documents, read = self._begun_documents()
        tokens = self._given * self._length
        return {
            "documents": documents,
            "sequences": self._given,
            "tokens": tokens,
            "dropped": read - tokens,
        }

    def _begun_documents(self) -> tuple[int, int]:
        """How many documents begin within what was taken, and where the last of them ends."""
        taken = self._given * self._length
        if taken == 0:
            return 0, 0
        number = int(np.searchsorted(self._ends[0], taken))  # the first that ends there or behind
        return self._documents_passed + number + 1, int(self._ends[0][number])

    def _pull(self) -> bool:
        """Reads a group; whether there was one."""
        room = None if self._room is None else self._room - self._pulled
        group = next(self._groups, None) if room is None or room > 0 else None
        if group is None:
            return False
        ids, ends = group.ids, group.ends
        if room is not None and ends[-1] > room:
            ends = ends[: int(np.searchsorted(ends, room)) + 1]
            ids = ids[: ends[-1]]
        self._held.append(ids)
        self._ends.append(ends + self._pulled)
        self._pulled += len(ids)
        self._documents_pulled += len(ends)
        return True


class Turns:
    """Which of several sources the next rows are of: each one's k-th row (from 0) is due at
    (k + 1/2) / weight, and the earliest is next, of equals the first source's.

    After n rows a source of weight w has had n·w of them, less or more than half the number of sources
    and a half. The order of the first n is the same however many follow.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights` above 0 with the sum 1."""
        self._weights = np.asarray(weights, dtype=np.float64)
        self._had = np.zeros(len(weights), dtype=np.int64)

    def take(self, rows: int) -> np.ndarray:
        """The sources of the next rows, int64 (rows,)."""
        due, sources = [], []
        for source, weight in enumerate(self._weights):
            most = min(rows, int(rows * weight) + len(self._weights) + 2)
            numbers = np.arange(self._had[source], self._had[source] + most)
            due.append((numbers + 0.5) / weight)
            sources.append(np.full(most, source, dtype=np.int64))
        of = np.concatenate(sources)
        chosen = of[np.lexsort((of, np.concatenate(due)))][:rows]
        self._had += np.bincount(chosen, minlength=len(self._weights))
        return chosen


_BLOCK = 1 << 16


def rows_of_each(weights: Sequence[float], rows: int) -> list[int]:
    """How many of the first `rows` are of each source."""
    turns, counts = Turns(weights), np.zeros(len(weights), dtype=np.int64)
    for start in range(0, rows, _BLOCK):
        counts += np.bincount(turns.take(min(_BLOCK, rows - start)), minlength=len(weights))
    return [int(count) for count in counts]
