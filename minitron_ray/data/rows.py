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

JSONL: Final = (".jsonl", ".ndjson")
PARQUET: Final = (".parquet",)
_ARROW: Final = (".arrow", ".feather", ".ipc")
_BATCH: Final = 1024


def read_rows(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    """`(line or row, 1-based; value)` of a column of a jsonl or parquet file.

    Raises ConfigError for a damaged file or a column that is not there.
    """
    reader = _read_jsonl if path.suffix.lower() in JSONL else _read_parquet
    return reader(path, column)


def read_token_rows(path: Path, column: str) -> Iterator[np.ndarray]:
    """Rows of token ids, int64 (length,), in file order. Raises ConfigError for anything else."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        rows = _read_npy(path)
    elif suffix in JSONL:
        rows = _read_jsonl(path, column)
    elif suffix in PARQUET:
        rows = _read_parquet(path, column)
    elif suffix in _ARROW:
        rows = _read_arrow(path, column)
    else:
        raise ConfigError(
            f"{path}: token ids are read from parquet, arrow, jsonl and npy, not from {suffix!r}"
        )
    for place, value in rows:
        yield _ids(path, place, column, value)


def _ids(path: Path, place: int, column: str, value: Any) -> np.ndarray:
    try:
        ids = np.asarray(value if value is not None else [])
    except ValueError:  # ragged lists
        ids = np.empty((0, 0))
    if ids.ndim != 1 or len(ids) == 0 or ids.dtype.kind not in "iu":
        raise ConfigError(f"{path}:{place}: {column!r} must be a list of token ids (whole numbers)")
    return ids.astype(np.int64)


def _read_jsonl(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}:{number}: not a line of JSON: {error}") from error
            if not isinstance(row, dict) or column not in row:
                raise ConfigError(
                    _no_column(f"{path}:{number}", column, row if isinstance(row, dict) else ())
                )
            yield number, row[column]


def _read_parquet(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ConfigError(_no_column(str(path), column, file.schema_arrow.names))
            batches = (batch.column(0) for batch in file.iter_batches(_BATCH, columns=[column]))
            yield from _number(batches)
    except pa.ArrowException as error:
        raise ConfigError(_damaged(path, "parquet", error)) from error


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
    except pa.ArrowException as error:
        raise ConfigError(_damaged(path, "arrow", error)) from error


def _number(columns: Iterator[pa.Array]) -> Iterator[tuple[int, Any]]:
    place = 0
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
        raise ConfigError(_damaged(path, "npy", error)) from error
    if rows.ndim != 2:
        raise ConfigError(
            f"{path}: an array of token ids has the shape (sequences, tokens), not {rows.shape}"
        )
    yield from enumerate(rows, start=1)


def _no_column(where: str, column: str, found: Any) -> str:
    names = ", ".join(sorted(map(str, found))[:12]) or "none"
    return f"{where}: no column {column!r} (found: {names}); name it with `data.source.column`"


def _damaged(path: Path, form: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} can't be read as {form}: {reason}"
