"""`Store`: the tables of one run, as immutable Arrow IPC fragments.

    tables/<table>/<writer>-<sequence>.arrow

Writers never wait for each other and readers never see half a fragment. The name is the identity:
appending the same (writer, sequence) again replaces the fragment instead of doubling its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.results.files import make_folder, write_file
from minitron_ray.results.schemas import TABLES, full_schema

_WRITER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Store:
    """The tables in a run folder. Holds no handle: it can be pickled and used in any process."""

    folder: Path
    experiment: str
    run_id: str

    def append(
        self, table: str, rows: Iterable[dict[str, Any]] | pa.Table, *, writer: str, sequence: int
    ) -> None:
        """Writes the rows as one fragment, durable when this returns.

        A column not given is null; times may be Unix seconds. Millions of rows are better given as an
        Arrow table with the columns of the schema, without the envelope. Raises KeyError for an unknown table,
        TypeError for an unknown column or a value that does not fit, EnvironmentFailure where the
        folder can't be written.
        """
        whole = self._enveloped(table, rows) if isinstance(rows, pa.Table) else self._table(table, list(rows))
        content = _encode(whole)
        make_folder(self._folder(table))
        write_file(self._fragment(table, writer, sequence), content)

    def read(self, table: str) -> pa.Table:
        """All rows, fragments in the order of their names. Empty, with all columns, if there are none."""
        return _read(table, self._fragments(table))

    def remove(self, table: str, writer: str, first: int = 0) -> None:
        """Drops all fragments of a writer from sequence `first` on, the highest first."""
        for path in reversed(self._fragments(table)):
            own, _, sequence = path.stem.rpartition("-")
            if own == writer and int(sequence) >= first:
                path.unlink(missing_ok=True)

    def fragments(self, table: str, writers: str) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
        """Writer, sequence and rows (without the envelope) of every fragment whose writer begins so."""
        for path in self._fragments(table):
            writer, _, sequence = path.stem.rpartition("-")
            if writer.startswith(writers):
                rows = _read(table, [path]).select(TABLES[table].names).to_pylist()
                yield writer, int(sequence), rows

    def has(self, table: str, writer: str, sequence: int) -> bool:
        """Whether that fragment has been written."""
        return self._fragment(table, writer, sequence).is_file()

    def _folder(self, table: str) -> Path:
        full_schema(table)  # raises KeyError for an unknown table
        return Path(self.folder) / "tables" / table

    def _fragment(self, table: str, writer: str, sequence: int) -> Path:
        if not _WRITER.fullmatch(writer):
            raise ValueError(f"{writer!r} cannot name a writer: letters, digits, '.', '_', '-'")
        if sequence < 0:
            raise ValueError(f"sequence {sequence} is negative")
        return self._folder(table) / f"{writer}-{sequence:08d}.arrow"

    def _fragments(self, table: str) -> list[Path]:
        return _fragments(self._folder(table))

    def _table(self, table: str, rows: Sequence[dict[str, Any]]) -> pa.Table:
        schema = full_schema(table)
        for row in rows:
            unknown = [name for name in row if name not in TABLES[table].names]
            if unknown:
                raise TypeError(f"table {table} has no column {unknown[0]!r}; it has {TABLES[table].names}")
        rows = [{"experiment": self.experiment, "run_id": self.run_id} | row for row in rows]
        return pa.Table.from_arrays(
            [_column(table, column, [row.get(column.name) for row in rows]) for column in schema],
            schema=schema,
        )

    def _enveloped(self, table: str, columns: pa.Table) -> pa.Table:
        if columns.schema != TABLES[table]:
            raise TypeError(f"table {table} has the columns {TABLES[table].names}, not {columns.schema}")
        envelope = [pa.repeat(value, len(columns)) for value in (self.experiment, self.run_id)]
        return pa.Table.from_arrays([*envelope, *columns.columns], schema=full_schema(table))


def read_table(results: Path, table: str) -> pa.Table:
    """The rows of all runs of all experiments under a results folder."""
    full_schema(table)
    folders = sorted(Path(results).glob(f"*/*/tables/{table}"))
    return _read(table, [path for folder in folders for path in _fragments(folder)])


def _fragments(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.arrow") if not path.name.startswith("."))


def _column(table: str, column: pa.Field, values: list[Any]) -> pa.Array:
    if pa.types.is_timestamp(column.type):
        values = [datetime.fromtimestamp(v, UTC) if isinstance(v, (int, float)) else v for v in values]
    if pa.types.is_integer(column.type):
        for value in values:
            if isinstance(value, float) and not value.is_integer():  # pyarrow would cut it off silently
                raise TypeError(f"table {table}, column {column.name} ({column.type}): {value} is not whole")
    try:
        return pa.array(values, column.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"table {table}, column {column.name} ({column.type}): {error}") from error


def _encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _read(table: str, fragments: Iterable[Path]) -> pa.Table:
    schema = full_schema(table)
    parts = [_grown(_decode(path), schema) for path in fragments]
    return pa.concat_tables(parts) if parts else schema.empty_table()


def _decode(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise EnvironmentFailure(
            f"{path}: not a readable Arrow file ({error}); move it away to go on without its rows"
        ) from error


def _grown(part: pa.Table, schema: pa.Schema) -> pa.Table:
    """A fragment as written by an older version, with the columns it did not know yet as nulls."""
    if part.schema.equals(schema, check_metadata=True):
        return part
    columns = [
        part[column.name].cast(column.type) if column.name in part.column_names else _nulls(part, column)
        for column in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _nulls(part: pa.Table, column: pa.Field) -> pa.Array:
    return pa.nulls(part.num_rows, column.type)
