"""Text to token ids: document by document, or shard by shard by many tasks, each shard kept when it is done.

    results/.cache/shards/<digest of text, tokenizer and shard>/
        ids.bin             uint32, the documents one after another, each with its separator
        ends.npy            int64, where each of them ends
        counts.json         documents, tokens, and whether the shard was read to its end

Of every shard the same bytes, whoever makes them; a build that was killed goes on behind the shards that
are there. They may be removed at any time: what was packed from them stands on its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from minitron_ray.core.errors import ConfigError, EnvironmentFailure
from minitron_ray.core.fingerprint import digest
from minitron_ray.data.packing import Group
from minitron_ray.data.reading import SHARD
from minitron_ray.data.source import Document, Shard
from minitron_ray.data.tokenizer import TextTokenizer, load_tokenizer
from minitron_ray.results.cache import Cache

KIND: Final = "shards"
_IDS, _ENDS, _COUNTS = "ids.bin", "ends.npy", "counts.json"
_BATCH_CHARACTERS: Final = 1 << 20
_TOKENS_A_SHARD: Final = 1 << 23
"""A guess, until there is a first one."""


class Spread(Protocol):
    """Who does parts of one piece of work: tasks on a cluster."""

    @property
    def one_thread(self) -> bool:
        """Whether each has one processor, and not this machine's."""

    def spread(self, function: Callable[..., Any], parts: Sequence[Any], *arguments: Any) -> list[Any]:
        """`function(part, *arguments, report)` of every part, in their order; `report` tells a stage's
        progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """This process: one after another, with the threads that the tokenizer takes."""

    report: Callable[..., None]
    one_thread: bool = False

    def spread(self, function: Callable[..., Any], parts: Sequence[Any], *arguments: Any) -> list[Any]:
        return [function(part, *arguments, self.report) for part in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """A shard's token ids, in a folder."""

    folder: Path

    @property
    def tokens(self) -> int:
        return int(json.loads((self.folder / _COUNTS).read_text(encoding="utf-8"))["tokens"])

    def group(self) -> Group | None:
        """All of them, mapped; None where the shard holds no text."""
        if self.tokens == 0:
            return None
        return Group(np.memmap(self.folder / _IDS, np.uint32, "r"), np.load(self.folder / _ENDS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every task of one text needs. Picklable."""

    text: str
    """Digest of the text's identity and the tokenizer's."""
    tokenizer: Path
    cache: Cache
    length: int
    """Of sequences, in which progress is told."""
    needed: int | None
    """Tokens that are needed of the whole text; None is all."""

    def find(self, shard: Shard) -> Tokenized | None:
        """What an earlier build left of it."""
        found = self.cache.find(KIND, self._key(shard))
        return None if found is None else Tokenized(folder=found)

    def bound(self, shard: Shard) -> int | None:
        """Where a shard of unknown size ends for us: at a power of two, so that a little more text finds it
        again. None: nowhere."""
        if self.needed is None or (shard.size is not None and shard.size <= 2 * SHARD):
            return None
        return 1 << max(0, self.needed - 1).bit_length()

    def make(self, shard: Shard, report: Callable[[int], None]) -> Tokenized:
        """The shard's ids, from the cache or made now; `report` is told how many there are so far."""
        bound = self.bound(shard)

        def fill(folder: Path) -> None:
            tokens, ends = 0, [np.empty(0, np.int64)]
            with (folder / _IDS).open("wb") as out:
                for group in encode(shard.documents(), load_tokenizer(self.tokenizer)):
                    out.write(group.ids.astype(np.uint32).tobytes())
                    ends.append(group.ends + tokens)
                    tokens += len(group.ids)
                    report(tokens)
                    if bound is not None and tokens >= bound:
                        break
            np.save(folder / _ENDS, np.concatenate(ends))
            counts = {"documents": sum(map(len, ends)), "tokens": tokens}
            (folder / _COUNTS).write_text(json.dumps(counts), encoding="utf-8")

        describe = {"text": self.text, "shard": shard.identity, "bound": bound}
        return Tokenized(folder=self.cache.ensure(KIND, self._key(shard), describe, fill))

    def _key(self, shard: Shard) -> str:
        return digest([self.text, shard.identity, self.bound(shard)])


def tokenize_shard(
    part: tuple[Shard, int], work: Work, one_thread: bool, report: Callable[..., None]
) -> None:
    """In a task: makes a shard, and tells the sequences of it and those `before` it."""
    shard, before = part
    if one_thread:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    work.make(
        shard,
        lambda tokens: report(
            "stage_progress",
            stage="prepare",
            done=(before + tokens) // work.length,
            total=None if work.needed is None else work.needed // work.length,
            unit="sequences",
        ),
    )


def tokenize_shards(shards: Iterable[Shard], work: Work, spread: Spread) -> list[Tokenized]:
    """The ids of a text's first shards, as many as hold what is needed, or of all; what is missing is made by
    `spread`. Raises EnvironmentFailure where tasks leave them where this process does not see them.

    How many are begun at a time follows from what the others gave: where nothing is known, as of a stream's
    files, the first one goes alone.
    """
    found: list[Tokenized] = []
    waiting: Iterator[Shard] = iter(shards)
    total = 0
    while work.needed is None or total < work.needed:
        wave = list(islice(waiting, _wave(found, total, work)))
        if not wave:
            break
        if not found and work.bound(wave[0]) is not None:
            wave, waiting = wave[:1], chain(wave[1:], waiting)
        missing = [shard for shard in wave if work.find(shard) is None]
        parts = [(shard, total if number == 0 else 0) for number, shard in enumerate(missing)]
        if parts:
            spread.spread(tokenize_shard, parts, work, spread.one_thread)
        for shard in wave:
            tokenized = work.find(shard)
            if tokenized is None:
                raise EnvironmentFailure(
                    f"a task's shard is not in {work.cache.folder}: every node must see the results folder; put "
                    "--results on a shared file system, or set tokenizers: 1 in the cluster file"
                )
            found.append(tokenized)
            total += tokenized.tokens
    return found


def _wave(found: list[Tokenized], total: int, work: Work) -> int | None:
    """How many shards are done next; None is all."""
    if work.needed is None:
        return None
    each = max(1.0, total / len(found)) if found else _TOKENS_A_SHARD
    return math.ceil((work.needed - total) / each)


def encode(documents: Iterable[Document], tokenizer: TextTokenizer) -> Iterator[Group]:
    """Documents' ids in groups of about a megabyte of text, enough to keep the tokenizer's threads busy.

    Raises ConfigError for an id that the model does not know.
    """
    number = 0
    for texts in _batches(documents):
        encoded = tokenizer.encode(texts)
        check_ids(encoded, tokenizer.vocabulary, number)
        number += len(texts)
        yield Group.of(encoded)


def check_ids(rows: Sequence[np.ndarray], vocabulary: int, before: int) -> None:
    """Raises ConfigError for an id outside the vocabulary; `before` is the number of rows before these."""
    for number, ids in enumerate(rows, start=before + 1):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise ConfigError(
                f"row or document {number} of the text holds token id {low if low < 0 else high}, the model's "
                f"vocabulary has {vocabulary:,} entries; the tokens or the tokenizer belong to another model"
            )


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
