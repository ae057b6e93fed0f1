"""One column out of jsonl, parquet, arrow and npy files, row by row, never a whole file in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minitron_ray.core.errors import ConfigError
from minitron_ray.data.storage import StoredFile, local_file

JSONL: Final = (".jsonl", ".ndjson")
PARQUET: Final = (".parquet",)
_ARROW: Final = (".arrow", ".feather", ".ipc")
_BATCH: Final = 1024
_BLOCK: Final = 1 << 20

Span = tuple[int, int]
"""A part of a file, first and end: bytes of lines, or row groups of parquet."""


def read_rows(file: StoredFile, column: str, span: Span | None = None) -> Iterator[tuple[str, Any]]:
    """`(which line or row, 1-based; value)` of a column of parquet or of lines of JSON.

    `span` takes the lines that begin in those bytes, or those row groups. Raises ConfigError for a
    damaged file or a column that is not there.
    """
    reader = _read_parquet if file.suffix in PARQUET else _read_jsonl
    return reader(file, column, span)


def row_groups(file: StoredFile, column: str) -> list[int]:
    """The bytes of each row group of a parquet file, uncompressed. Raises ConfigError as `read_rows`."""
    try:
        with file.open() as stream, pq.ParquetFile(stream) as parquet:
            _check_column(file, column, parquet)
            about = parquet.metadata
            return [about.row_group(number).total_byte_size for number in range(about.num_row_groups)]
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(_damaged(file.where, "parquet", error)) from error


def read_token_rows(path: Path, column: str) -> Iterator[np.ndarray]:
    """Rows of token ids, int64 (length,), in file order. Raises ConfigError for anything else."""
    suffix = path.suffix.lower()
    rows: Iterator[tuple[Any, Any]]
    if suffix == ".npy":
        rows = _read_npy(path)
    elif suffix in JSONL:
        rows = _read_jsonl(local_file(path), column)
    elif suffix in PARQUET:
        rows = _read_parquet(local_file(path), column)
    elif suffix in _ARROW:
        rows = _read_arrow(path, column)
    else:
        raise ConfigError(
            f"{path}: token ids are read from parquet, arrow, jsonl and npy, not from {suffix!r}"
        )
    for place, value in rows:
        yield _ids(path, place, column, value)


def _ids(path: Path, place: Any, column: str, value: Any) -> np.ndarray:
    try:
        ids = np.asarray(value if value is not None else [])
    except ValueError:  # ragged lists
        ids = np.empty((0, 0))
    if ids.ndim != 1 or len(ids) == 0 or ids.dtype.kind not in "iu":
        raise ConfigError(f"{path}:{place}: {column!r} must be a list of token ids (whole numbers)")
    return ids.astype(np.int64)


def _lines(file: StoredFile, span: Span | None) -> Iterator[bytes]:
    """The lines of a file, or those that begin in a span of its bytes."""
    start, stop = span or (0, None)
    # From the byte before: if that ends a line, what follows begins one.
    at, inside = max(start - 1, 0), start > 0
    with file.open() as stream:
        if at:
            stream.seek(at)
        rest, ended = b"", False
        while not ended:
            block = stream.read(_BLOCK)
            ended = not block
            lines = (rest + block).split(b"\n")
            rest = b"" if ended else lines.pop()
            for line in lines:
                if not inside:
                    if stop is not None and at >= stop:
                        return
                    yield line
                inside, at = False, at + len(line) + 1


def _read_jsonl(file: StoredFile, column: str, span: Span | None = None) -> Iterator[tuple[str, Any]]:
    after = f" after byte {span[0]}" if span and span[0] else ""
    for number, line in enumerate(_lines(file, span), start=1):
        if not line.strip():
            continue
        where = f"{file.where}:{number}{after}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not a line of JSON: {error}") from error
        if not isinstance(row, dict) or column not in row:
            raise ConfigError(_no_column(where, column, row if isinstance(row, dict) else ()))
        yield f"{number}{after}", row[column]


def _read_parquet(file: StoredFile, column: str, span: Span | None = None) -> Iterator[tuple[str, Any]]:
    try:
        with file.open() as stream, pq.ParquetFile(stream) as parquet:
            _check_column(file, column, parquet)
            first, end = span or (0, parquet.metadata.num_row_groups)
            before = sum(parquet.metadata.row_group(number).num_rows for number in range(first))
            groups = list(range(first, end))
            batches = parquet.iter_batches(_BATCH, row_groups=groups, columns=[column])
            for place, value in _number((batch.column(0) for batch in batches), before):
                yield str(place), value
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(_damaged(file.where, "parquet", error)) from error


def _check_column(file: StoredFile, column: str, parquet: pq.ParquetFile) -> None:
    names = parquet.schema_arrow.names
    if column not in names:
        raise ConfigError(_no_column(file.where, column, names))


def _read_arrow(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    """Arrow IPC, both the file and the stream format (which the datasets library writes)."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
                names = file.schema.names
            except pa.ArrowInvalid:
                source.seek(0)
                stream = pa.ipc.open_stream(source)
                batches, names = (batch for batch in stream), stream.schema.names
            if column not in names:
                raise ConfigError(_no_column(str(path), column, names))
            yield from _number(batch.column(column) for batch in batches)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(_damaged(str(path), "arrow", error)) from error


def _number(columns: Iterator[pa.Array], before: int = 0) -> Iterator[tuple[int, Any]]:
    place = before
    for values in columns:
        for value in values:
            place += 1
            if isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
                yield place, None if value.values is None else value.values.to_numpy(zero_copy_only=False)
            else:
                yield place, value.as_py()


def _read_npy(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(_damaged(str(path), "npy", error)) from error
    if rows.ndim != 2:
        raise ConfigError(
            f"{path}: an array of token ids has the shape (sequences, tokens), not {rows.shape}"
        )
    yield from enumerate(rows, start=1)


def _no_column(where: str, column: str, found: Any) -> str:
    names = ", ".join(sorted(map(str, found))[:12]) or "none"
    return f"{where}: no column {column!r} (found: {names}); name it with `data.source.column`"


def _damaged(where: str, form: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{where} can't be read as {form}: {reason}; it is damaged, fetch it again"
