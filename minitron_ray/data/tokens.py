"""`TokenStore`: packed sequences of one length, memory-mapped, built once and found again by content.

    results/.cache/tokens/<digest>/
        tokens.arrow        Arrow IPC: FixedSizeList<uint32>[sequence_length], 1,024 rows a batch
        counts.json         documents, sequences, tokens, dropped tokens

Documents are tokenised, ended with the end-of-text token, concatenated and cut: no padding, since
padding would count as text in every score. What does not fill the last sequence is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.fingerprint import digest
from minitron_ray.data.source import Document, Source, TextSource, TokenSource
from minitron_ray.data.tokenizer import load_tokenizer, tokenizer_digest

if TYPE_CHECKING:
    from minitron_ray.results.cache import Cache

KIND: Final = "tokens"
PACKING: Final = 1
"""Version of the rule by which documents become sequences; part of every store's digest."""
_FILE: Final = "tokens.arrow"
_COUNTS: Final = "counts.json"
_ROWS: Final = 1024
_BATCH_CHARACTERS: Final = 1 << 20


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
        return self.folder.name

    @cached_property
    def counts(self) -> dict[str, int]:
        """`documents` (rows of a `tokens` source), `sequences`, `tokens` in them, `dropped` tokens."""
        counts: dict[str, int] = json.loads((self.folder / _COUNTS).read_text(encoding="utf-8"))
        return counts

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
) -> TokenStore:
    """The store of a source, from the cache or built now, at most `limit_sequences` long.

    `progress` is called with the number of sequences written so far. Raises ConfigError where the
    source gives fewer than `minimum_sequences`, holds ids that the model does not know, or can't be read.
    """
    identity = {
        "source": source.identity(base, cache),
        "tokenizer": tokenizer_digest(tokenizer_folder),
        "sequence_length": sequence_length,
        "limit_sequences": limit_sequences,
        "packing": PACKING,
    }

    def fill(folder: Path) -> None:
        writer = _Writer(folder / _FILE, sequence_length, limit_sequences, identity, progress)
        with writer:
            for ids in _ids(source, tokenizer_folder, sequence_length, base, cache):
                if not writer.append(ids):
                    break
        (folder / _COUNTS).write_text(json.dumps(writer.counts()), encoding="utf-8")

    describe = {"kind": source.kind, **identity}  # type: ignore[attr-defined]  # every plug-in has a kind
    store = TokenStore(cache.ensure(KIND, digest(identity), describe, fill))
    if len(store) < minimum_sequences:
        raise ConfigError(
            f"the text gives {len(store):,} sequences of {sequence_length} tokens, {minimum_sequences:,} are "
            "needed; add text, or lower data.calibration, data.validation or data.sequence_length"
        )
    return store


def _ids(
    source: Source, tokenizer_folder: Path, length: int, base: Path, cache: Cache
) -> Iterator[np.ndarray]:
    """Token ids a document, or a row of tokens that exist already; checked against the vocabulary."""
    tokenizer = load_tokenizer(tokenizer_folder)
    if isinstance(source, TextSource):
        texts = _batches(source.documents(base, cache))
        rows: Iterable[np.ndarray] = (ids for batch in texts for ids in tokenizer.encode(batch))
    else:
        assert isinstance(source, TokenSource)
        rows = _whole_rows(source.sequences(base, cache), length)
    for number, ids in enumerate(rows, start=1):
        if ids.min() < 0 or ids.max() >= tokenizer.vocabulary:
            raise ConfigError(
                f"row or document {number} of the text holds token id {_worst(ids)}, the model's vocabulary "
                f"has {tokenizer.vocabulary:,} entries; the tokens or the tokenizer belong to another model"
            )
        yield ids


def _whole_rows(rows: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Rows used as they stand, hence of exactly one length."""
    for number, ids in enumerate(rows, start=1):
        if len(ids) != length:
            raise ConfigError(
                f"row {number} of the tokens has {len(ids):,} ids, data.sequence_length is {length}; rows "
                "are used as they stand, so set data.sequence_length to their length"
            )
        yield ids


def _worst(ids: np.ndarray) -> int:
    return int(ids.min() if ids.min() < 0 else ids.max())


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Texts in groups of about a megabyte, enough to keep the tokenizer's threads busy."""
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


class _Writer:
    """Packs ids into sequences and streams them to an Arrow file, holding one record batch."""

    def __init__(
        self,
        path: Path,
        length: int,
        limit: int | None,
        identity: dict[str, Any],
        progress: Callable[[int], None],
    ) -> None:
        schema = pa.schema([pa.field("input_ids", pa.list_(pa.uint32(), length), nullable=False)])
        self._schema = schema.with_metadata({"minitron_ray": json.dumps(identity, sort_keys=True)})
        self._path, self._length, self._limit, self._progress = path, length, limit, progress
        self._buffer = np.empty(_ROWS * length, dtype=np.uint32)
        self._used = self._written = self._documents = self._tokens = 0

    def __enter__(self) -> _Writer:
        self._file = pa.ipc.new_file(str(self._path), self._schema)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._file.close()

    def append(self, ids: np.ndarray) -> bool:
        """Adds one document or row; whether there is room for more."""
        self._documents += 1
        self._tokens += len(ids)
        start = 0
        while start < len(ids):
            piece = ids[start : start + self._buffer.size - self._used]
            self._buffer[self._used : self._used + len(piece)] = piece
            self._used += len(piece)
            start += len(piece)
            if self._used == self._buffer.size:
                self._flush()
        return self._limit is None or self._written + self._used // self._length < self._limit

    def counts(self) -> dict[str, int]:
        tokens = self._written * self._length
        return {
            "documents": self._documents,
            "sequences": self._written,
            "tokens": tokens,
            "dropped": self._tokens - tokens,
        }

    def _flush(self) -> None:
        rows = self._used // self._length
        if self._limit is not None:
            rows = min(rows, self._limit - self._written)
        if rows:
            flat = pa.array(self._buffer[: rows * self._length])
            column = pa.FixedSizeListArray.from_arrays(flat, self._length)
            self._file.write_batch(pa.record_batch([column], schema=self._schema))
            self._written += rows
            self._progress(self._written)
        self._used = 0
