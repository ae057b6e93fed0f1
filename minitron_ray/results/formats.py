"""A table of results as text for people (`table`), for programs (`csv`, `json`, `jsonl`) or as a file
(`arrow`, `parquet`). NaN, which not all of them can say, is written as null in all of them."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import shutil
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Final, TextIO

import pyarrow as pa

from minitron_ray.core.errors import ConfigError

FORMATS: Final = ("table", "csv", "json", "jsonl", "arrow", "parquet")
_BINARY: Final = ("arrow", "parquet")


def write(table: pa.Table, format: str, stream: TextIO) -> None:
    """Writes in one of FORMATS. Raises ConfigError for an unknown one, or a binary one on a terminal."""
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; one of {', '.join(FORMATS)}")
    if format in _BINARY:
        _write_binary(table, format, stream)
    elif format == "csv":
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(table.column_names)
        rows.writerows([_csv(value) for value in row] for row in _rows(table))
    elif format == "json":
        items = (_json(table.column_names, row) for row in _rows(table))
        stream.write("[" + "".join(f"{',' if i else ''}\n  {item}" for i, item in enumerate(items)) + "\n]\n")
    elif format == "jsonl":
        stream.writelines(_json(table.column_names, row) + "\n" for row in _rows(table))
    else:
        _write_text(table, stream)


def _rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    columns = [[_plain(value) for value in column.to_pylist()] for column in table.columns]
    return zip(*columns, strict=True) if columns else iter(())


def _plain(value: Any) -> Any:
    """A value that JSON has a word for. DuckDB sums integers into decimals."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, date) else value


def _json(names: list[str], row: tuple[Any, ...]) -> str:
    return json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, allow_nan=False, default=str)


def _csv(value: Any) -> Any:
    return json.dumps(value, default=str) if isinstance(value, (list, dict)) else value


def _write_binary(table: pa.Table, format: str, stream: TextIO) -> None:
    if stream.isatty():
        raise ConfigError(
            f"{format} is a binary format: send it to a file or a program, as in `... > out.{format}`"
        )
    table = pa.table([_without_nan(column) for column in table.columns], schema=table.schema)
    stream.flush()
    if format == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, stream.buffer)
    else:
        with pa.ipc.new_file(stream.buffer, table.schema) as writer:
            writer.write_table(table)
    stream.buffer.flush()


def _without_nan(column: pa.ChunkedArray) -> pa.ChunkedArray:
    from pyarrow import compute

    if not pa.types.is_floating(column.type):
        return column
    return compute.if_else(compute.is_nan(column), pa.scalar(None, column.type), column)


def _write_text(table: pa.Table, stream: TextIO) -> None:
    """Aligned columns where they fit, one block a row where they don't: no value is ever cut."""
    names = table.column_names
    if names == ["explain_key", "explain_value"]:
        stream.writelines(f"{text}\n" for text in table["explain_value"].to_pylist())
        return
    rows = [[_text(value) for value in row] for row in _rows(table)]
    columns = list(zip(names, *rows, strict=True))
    widths = [max(len(text) for text in column) for column in columns]
    room = shutil.get_terminal_size().columns if stream.isatty() else None
    if room is not None and sum(widths) + 2 * (len(widths) - 1) > room:
        _write_blocks(names, rows, stream)
    else:
        right = [_is_number(column.type) for column in table.columns]
        for row in (names, ["-" * width for width in widths], *rows):
            cells = zip(row, widths, right, strict=True)
            line = "  ".join(c.rjust(w) if on_right else c.ljust(w) for c, w, on_right in cells)
            stream.write(line.rstrip() + "\n")
    stream.write(f"({table.num_rows} row{'' if table.num_rows == 1 else 's'})\n")


def _write_blocks(names: list[str], rows: list[list[str]], stream: TextIO) -> None:
    width = max(map(len, names))
    for number, row in enumerate(rows, start=1):
        stream.write(f"-- row {number}\n")
        stream.writelines(f"{name.ljust(width)}  {text}\n" for name, text in zip(names, row, strict=True))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _short(value)
    text = json.dumps(value, default=str) if isinstance(value, (list, dict)) else str(value)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)  # a message may hold line breaks and escapes


def _short(value: float) -> str:
    """Six decimals, or six digits where the value is too small or too large for that."""
    if value and not 1e-3 <= abs(value) < 1e15:
        return f"{value:.6g}"
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))
