"""`TokenStore`: packed sequences of one length, memory-mapped, built once and found again by content.

    results/.cache/tokens/<digest>/
        tokens.arrow        Arrow IPC: FixedSizeList<uint32>[sequence_length], 1,024 rows a batch
        counts.json         documents, sequences, tokens, dropped tokens
        parts.json          the same of each source, and whether the store ends where it had no more
        content.sha256      of the tokens, only where the text is kept in an object store: the store's digest

Documents are tokenised, ended with the end-of-text token, concatenated and cut: no padding, since
padding would count as text in every score. Where a document begins is read off the end-of-text tokens,
so that a store is the same whether documents are joined or apart (`weights/documents.py`). What does not
fill the last sequence is dropped. A sequence is of one source. Little text is tokenised here, in one go;
more of it in shards, by tasks where there are any, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.fingerprint import digest
from minitron_ray.data.packing import Group, Rows, Turns, rows_of_each
from minitron_ray.data.shards import Here, Spread, Work, check_ids, encode, tokenize_shards
from minitron_ray.data.source import MixedSource, Source, TextSource, TokenSource
from minitron_ray.data.tokenizer import TextTokenizer, load_tokenizer, tokenizer_digest

if TYPE_CHECKING:
    from minitron_ray.results.cache import Cache

KIND: Final = "tokens"
PACKING: Final = 1
"""Version of the rule by which documents become sequences; part of every store's digest."""
LARGE: Final = 64 * 2**20
"""Bytes of text from which on it is tokenised in shards."""
_BYTES_A_TOKEN: Final = 4
"""Of text, about: what a limit in tokens comes to."""
_FILE: Final = "tokens.arrow"
_COUNTS: Final = "counts.json"
_PARTS: Final = "parts.json"
_CONTENT: Final = "content.sha256"
_ROWS: Final = 1024


class TokenStore:
    """Sequences by number. Cheap to make and to pickle; the file is mapped when first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        """Number of sequences."""
        return int(self.counts["sequences"])

    @property
    def digest(self) -> str:
        """64 hex digits that stand for every token in it and their order."""
        content = self.folder / _CONTENT
        return content.read_text(encoding="ascii") if content.is_file() else self.folder.name

    @cached_property
    def counts(self) -> dict[str, int]:
        """`documents` (rows of a `tokens` source), `sequences`, `tokens` in them, `dropped` tokens."""
        counts: dict[str, int] = json.loads((self.folder / _COUNTS).read_text(encoding="utf-8"))
        return counts

    @cached_property
    def parts(self) -> list[dict[str, Any]]:
        """The counts of each source in it, in the mixture's order, and whether it `ended` the store."""
        path = self.folder / _PARTS
        if not path.is_file():  # made by an earlier version, which knew one source
            return [{**self.counts, "ended": True}]
        parts: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return parts

    @cached_property
    def sequence_length(self) -> int:
        return int(self._reader.schema.field(0).type.list_size)

    def sequences(self, indices: Sequence[int] | np.ndarray | range) -> np.ndarray:
        """Token ids of the sequences with these numbers, int64 (n, sequence_length), a copy.

        Raises IndexError for a number that is not there.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"sequences {wanted.min()} to {wanted.max()} of a store of {len(self)}")
        result = np.empty((len(wanted), self.sequence_length), dtype=np.int64)
        batches, rows = np.divmod(wanted, _ROWS)
        for batch in np.unique(batches):
            here = batches == batch
            result[here] = self._views[batch][rows[here]]
        return result

    @cached_property
    def _reader(self) -> pa.RecordBatchFileReader:
        return pa.ipc.open_file(pa.memory_map(str(self.folder / _FILE)))

    @cached_property
    def _views(self) -> list[np.ndarray]:
        """Each record batch as a (rows, length) array on the mapped file."""
        batches = (self._reader.get_batch(i) for i in range(self._reader.num_record_batches))
        return [
            batch.column(0).flatten().to_numpy(zero_copy_only=True).reshape(-1, self.sequence_length)
            for batch in batches
        ]


def build_tokens(
    source: Source,
    tokenizer_folder: Path,
    *,
    sequence_length: int,
    base: Path,
    cache: Cache,
    minimum_sequences: int = 1,
    limit_sequences: int | None = None,
    progress: Callable[[int], None] = lambda sequences: None,
    spread: Spread | None = None,
) -> TokenStore:
    """The store of a source, from the cache or built now, at most `limit_sequences` long.

    `progress` is called with the number of sequences written so far. `spread` are the tasks that tokenise
    much text; without them this process does. Raises ConfigError where the source gives fewer than
    `minimum_sequences`, holds ids that the model does not know, or can't be read.
    """
    identity = {
        "source": source.identity(base, cache),
        "tokenizer": tokenizer_digest(tokenizer_folder),
        "sequence_length": sequence_length,
        "limit_sequences": limit_sequences,
        "packing": PACKING,
    }
    build = _Build(
        tokenizer=tokenizer_folder, length=sequence_length, base=base, cache=cache, progress=progress
    )

    def fill(folder: Path) -> None:
        parts = build.parts(source, limit_sequences, spread)
        writer = _Writer(folder / _FILE, sequence_length, identity, progress, hashed=not source.by_content)
        with writer:
            ended = _pack(parts, source.weights, limit_sequences, writer)
        counts = [{**rows.counts(), "ended": number == ended} for number, rows in enumerate(parts)]
        names = ("documents", "sequences", "tokens", "dropped")
        total = {name: sum(part[name] for part in counts) for name in names}
        (folder / _COUNTS).write_text(json.dumps(total), encoding="utf-8")
        (folder / _PARTS).write_text(json.dumps(counts), encoding="utf-8")
        if writer.checksum is not None:
            (folder / _CONTENT).write_text(writer.checksum.hexdigest(), encoding="ascii")

    describe = {"kind": source.kind, **identity}  # type: ignore[attr-defined]  # every plug-in has a kind
    store = TokenStore(cache.ensure(KIND, digest(identity), describe, fill))
    if len(store) < minimum_sequences:
        raise ConfigError(_too_little(source, store, sequence_length, minimum_sequences))
    return store


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """What the parts of a store are made with."""

    tokenizer: Path
    length: int
    base: Path
    cache: Cache
    progress: Callable[[int], None]

    def parts(self, source: Source, limit: int | None, spread: Spread | None) -> list[Rows]:
        """The rows of each source of a mixture, or of the one there is; none is read further than needed."""
        sources = source.sources
        needed: Sequence[int | None] = [None] * len(sources)
        if limit is not None:
            needed = rows_of_each(source.weights, limit)
        texts = [(s, n) for s, n in zip(sources, needed, strict=True) if isinstance(s, TextSource)]
        sharded = sum(self._size(text, rows) for text, rows in texts) > LARGE
        found = []
        for one, rows in zip(sources, needed, strict=True):
            if isinstance(one, TokenSource):
                groups = self._rows_as_they_stand(one)
            else:
                assert isinstance(one, TextSource)
                groups = self._sharded(one, rows, spread) if sharded else self._read(one)
            found.append(Rows(groups, self.length, rows))
        return found

    def _size(self, source: TextSource, rows: int | None) -> float:
        """Bytes of text to tokenise, about, as far as it matters."""
        most = float("inf") if rows is None else float(rows * self.length * _BYTES_A_TOKEN)
        size = 0.0
        if most <= 0:
            return size
        for shard in source.shards(self.base, self.cache):
            size += float("inf") if shard.size is None else shard.size
            if size >= min(most, LARGE + 1):
                break
        return min(size, most)

    def _read(self, source: TextSource) -> Iterator[Group]:
        yield from encode(source.documents(self.base, self.cache), load_tokenizer(self.tokenizer))

    def _sharded(self, source: TextSource, rows: int | None, spread: Spread | None) -> Iterator[Group]:
        work = Work(
            text=digest([source.identity(self.base, self.cache), tokenizer_digest(self.tokenizer)]),
            tokenizer=self.tokenizer.resolve(),
            cache=self.cache,
            length=self.length,
            needed=None if rows is None else rows * self.length,
        )
        here = Here(report=lambda kind, *, done, **fields: self.progress(done))
        shards = source.shards(self.base, self.cache)
        tokenized = tokenize_shards(shards, work, spread or here)
        return (group for shard in tokenized if (group := shard.group()) is not None)

    def _rows_as_they_stand(self, source: TokenSource) -> Iterator[Group]:
        """Rows are not cut, hence of exactly one length."""
        tokenizer = load_tokenizer(self.tokenizer)
        for number, ids in enumerate(source.sequences(self.base, self.cache), start=1):
            if len(ids) != self.length:
                raise ConfigError(
                    f"row {number} of the tokens has {len(ids):,} ids, data.sequence_length is "
                    f"{self.length}; rows are used as they stand, so set data.sequence_length to their length"
                )
            check_ids([ids], tokenizer.vocabulary, number - 1)
            _check_padding(ids, tokenizer, number)
            yield Group.of([ids])


def _check_padding(ids: np.ndarray, tokenizer: TextTokenizer, number: int) -> None:
    """A model would learn to predict the padding of a row. One token of it alone may be another's, as where a
    tokenizer pads with its unknown token. Raises ConfigError."""
    if tokenizer.padding is None:
        return
    for end, name in ((ids[::-1], "ends"), (ids, "begins")):
        text = np.flatnonzero(end != tokenizer.padding)
        filled = int(text[0]) if len(text) else len(ids)
        if filled > 1:
            raise ConfigError(
                f"row {number} of the tokens {name} with {filled} of padding (id {tokenizer.padding}); rows are used "
                f"as they stand, so fill them with documents, each ended by the end-of-text token (id "
                f"{tokenizer.separator})"
            )


def _pack(parts: Sequence[Rows], weights: Sequence[float], limit: int | None, writer: _Writer) -> int | None:
    """Writes the rows of the parts in turns, up to the limit or until one has no more; which one that was."""
    turns, written = Turns(weights), 0
    while limit is None or written < limit:
        order = turns.take(_ROWS if limit is None else min(_ROWS, limit - written))
        places = [np.flatnonzero(order == number) for number in range(len(parts))]
        lacking = {}
        for number, (rows, mine) in enumerate(zip(parts, places, strict=True)):
            if (ready := rows.ready(len(mine))) < len(mine):
                lacking[int(mine[ready])] = number
        stop = min(lacking, default=len(order))
        block = np.empty((stop, writer.length), dtype=np.uint32)
        for rows, mine in zip(parts, places, strict=True):
            mine = mine[mine < stop]
            block[mine] = rows.take(len(mine))
        writer.write(block)
        written += stop
        if lacking:
            return lacking[stop]
    return None


def _too_little(source: Source, store: TokenStore, length: int, minimum: int) -> str:
    text = (
        f"the text gives {len(store):,} sequences of {length} tokens, {minimum:,} are needed; add text, or "
        "lower data.calibration, data.validation or data.sequence_length"
    )
    if isinstance(source, MixedSource):
        for number in (number for number, part in enumerate(store.parts) if part["ended"]):
            text += (
                f"; the mixture ends where data.source.parts[{number}] ({source.sources[number].title}) has no "
                f"more ({store.parts[number]['sequences']:,} sequences): add to that text, or lower its weight"
            )
    return text


class _Writer:
    """Streams rows to an Arrow file, in batches of `_ROWS` but for the last."""

    def __init__(
        self,
        path: Path,
        length: int,
        identity: dict[str, Any],
        progress: Callable[[int], None],
        *,
        hashed: bool = False,
    ) -> None:
        schema = pa.schema([pa.field("input_ids", pa.list_(pa.uint32(), length), nullable=False)])
        self._schema = schema.with_metadata({"minitron_ray": json.dumps(identity, sort_keys=True)})
        self._path, self._progress, self._written = path, progress, 0
        self.length = length
        self.checksum = hashlib.sha256(f"{length}:".encode()) if hashed else None

    def __enter__(self) -> _Writer:
        self._file = pa.ipc.new_file(str(self._path), self._schema)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, rows: np.ndarray) -> None:
        """uint32 (rows, length); only the last call may bring fewer than `_ROWS`."""
        if not len(rows):
            return
        assert self._written % _ROWS == 0, "a batch that is not full is the last"
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), self.length)
        self._file.write_batch(pa.record_batch([column], schema=self._schema))
        if self.checksum is not None:
            self.checksum.update(rows.astype("<u4").tobytes())
        self._written += len(rows)
        self._progress(self._written)
