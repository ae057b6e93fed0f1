"""SQL over the tables of all runs: `query` reads with DuckDB, `write` prints in six formats (`formats.py`).

The tables are registered from memory, then DuckDB loses access to files, network and configuration:
a query can read the tables and nothing else.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import duckdb
import pyarrow as pa

from minitron_ray.core.errors import ConfigError
from minitron_ray.results.formats import FORMATS, write
from minitron_ray.results.schemas import TABLES, full_schema
from minitron_ray.results.store import read_table

_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)


def query(results: Path, sql: str) -> pa.Table:
    """The result of one SELECT (also WITH, FROM, VALUES, DESCRIBE, SUMMARIZE, SHOW TABLES, EXPLAIN).

    Column names that the query gives twice get a suffix. Raises ConfigError, in one line, for
    anything else that is asked and for whatever DuckDB refuses.
    """
    with duckdb.connect(":memory:", config={"python_enable_replacements": "false"}) as connection:
        for name in TABLES:
            connection.register(name, _table(results, name, sql))
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        try:
            _check_reading_one(connection, sql)
            found: pa.Table = connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise ConfigError(f"query: {_one_line(str(error), sql)}") from error
    return found.rename_columns(_distinct(found.column_names))


def _table(results: Path, name: str, sql: str) -> pa.Table:
    """Reads only what the query can name: `steps` and `importance` grow large."""
    text = sql.lower()
    if name in text or "query_table" in text:
        return read_table(results, name)
    return full_schema(name).empty_table()


def _check_reading_one(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise ConfigError(f"query: one statement is run at a time, found {len(statements)}")
    if statements[0].type not in _READING:
        kind = statements[0].type.name
        raise ConfigError(f"query: the tables are read-only, found a {kind} statement; write a SELECT")


def _distinct(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return distinct


def _one_line(message: str, sql: str) -> str:
    """DuckDB's message without its drawing, and with our own near misses."""
    if found := re.search(r'Table with name "?([^"\s]+?)"? does not exist', message):
        return f"no table {found[1]!r}; {_suggest(found[1], list(TABLES))}"
    if found := re.search(r'(?:Referenced column|does not have a column named) "([^"]+)"', message):
        named = [name for name in TABLES if re.search(rf"\b{name}\b", sql, re.IGNORECASE)] or list(TABLES)
        columns = list(dict.fromkeys(column for name in named for column in full_schema(name).names))
        return f"no column {found[1]!r} in {', '.join(named)}; {_suggest(found[1], columns)}"
    if "disabled by configuration" in message:
        return f"{_first(message)}; a query reads the tables and nothing else"
    return _first(message)


def _first(message: str) -> str:
    """The sentence DuckDB begins with, without the name of the error's class."""
    return re.sub(r"^[A-Z]\w+( [A-Z]\w+)* Error: ", "", message.strip().splitlines()[0])


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there is {', '.join(known)}"


__all__ = ["FORMATS", "query", "write"]
