"""SQL over the tables: what it may read, what it says when it can't, and the six formats."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from minitron_ray.core.errors import ConfigError
from minitron_ray.results.formats import FORMATS, write
from minitron_ray.results.query import query
from minitron_ray.results.schemas import TABLES
from minitron_ray.results.store import Store

NAN = float("nan")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for run, losses in {"run1": (3.5, 3.25), "run2": (3.125, NAN)}.items():
        store = Store(tmp_path / "exp" / run, "exp", run)
        rows = [{"candidate_id": f"c{i}", "val_loss": loss, "tokens": 2**40} for i, loss in enumerate(losses)]
        store.append("trials", rows, writer="w", sequence=0)
    return tmp_path


def test_all_runs_are_one_table(results: Path) -> None:
    found = query(results, "select run_id, val_loss from trials where not isnan(val_loss) order by val_loss")
    assert found.to_pylist() == [
        {"run_id": "run2", "val_loss": 3.125},
        {"run_id": "run1", "val_loss": 3.25},
        {"run_id": "run1", "val_loss": 3.5},
    ]


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_there_even_if_nobody_wrote_it(tmp_path: Path, table: str) -> None:
    assert query(tmp_path, f"select count(*) as n from {table}").to_pylist() == [{"n": 0}]


@pytest.mark.parametrize(
    "sql",
    [
        "WITH t AS (SELECT * FROM TRIALS) SELECT count(*) AS n FROM t",
        "from trials select count(*) as n",
        "select count(*) as n from query_table('tri' || 'als');",
    ],
)
def test_other_ways_to_read(results: Path, sql: str) -> None:
    assert query(results, sql).to_pylist() == [{"n": 4}]


def test_the_schema_can_be_asked_for(results: Path) -> None:
    described = {row["column_name"] for row in query(results, "describe trials").to_pylist()}
    assert described == {"experiment", "run_id", *TABLES["trials"].names}
    assert {row["name"] for row in query(results, "show tables").to_pylist()} == set(TABLES)
    assert query(results, "explain select * from trials").num_rows >= 1


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("select * from trial", "^query: no table 'trial'; did you mean 'trials'"),
        ("select * from xyzzy", "^query: no table 'xyzzy'; there is runs, stages, importance"),
        ("select valloss from trials", "^query: no column 'valloss' in trials; did you mean 'val_loss'"),
        ("select t.los from steps t", "^query: no column 'los' in steps; did you mean 'loss'"),
        ("selec 1", '^query: syntax error at or near "selec"$'),
        ("select 1; select 2", "^query: one statement is run at a time, found 2$"),
        ("  ", "^query: one statement is run at a time, found 0$"),
        ("drop table trials", "^query: the tables are read-only, found a DROP statement"),
        ("insert into trials select * from trials", "read-only, found a INSERT statement"),
        ("copy (select 1) to '/tmp/leak.csv'", "read-only, found a COPY statement"),
        ("attach 'x.db'", "read-only, found a ATTACH statement"),
        ("set enable_external_access = true", "read-only, found a SET statement"),
        ("explain analyze copy (select 1) to '/tmp/leak.csv'", "a query reads the tables and nothing else"),
        ("select * from read_csv('/etc/passwd')", "a query reads the tables and nothing else"),
        ("select * from '/etc/passwd'", "^query: no table '/etc/passwd'"),
        ("select * from results", "^query: no table 'results'"),  # a Python variable of this very module
        ("select * from trials where tokens = 'many'", "^query: Could not convert string 'many' to INT64$"),
    ],
)
def test_what_it_refuses_in_one_line(results: Path, sql: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        query(results, sql)
    assert "\n" not in caught.value.message
    assert not Path("/tmp/leak.csv").exists()


def test_a_name_given_twice_gets_a_number(results: Path) -> None:
    assert query(results, "select 1 as a, 2 as a, 3 as b").column_names == ["a", "a_2", "b"]


SAMPLE = "select candidate_id, val_loss, tokens from trials order by run_id, candidate_id"


def written(table: pa.Table, format: str) -> str:
    stream = io.StringIO()
    write(table, format, stream)
    return stream.getvalue()


def test_csv_json_and_jsonl_say_null_for_nan(results: Path) -> None:
    found = query(results, SAMPLE)
    rows = json.loads(written(found, "json"))
    assert [row["val_loss"] for row in rows] == [3.5, 3.25, 3.125, None]
    assert [json.loads(line) for line in written(found, "jsonl").splitlines()] == rows
    text = list(csv.DictReader(io.StringIO(written(found, "csv"))))
    assert [row["val_loss"] for row in text] == ["3.5", "3.25", "3.125", ""]
    assert text[0]["tokens"] == str(2**40)


def test_sums_of_integers_are_integers(results: Path) -> None:
    found = query(results, "select sum(tokens) as n, avg(tokens) as mean, [1, 2] as list from trials")
    assert json.loads(written(found, "json")) == [{"n": 4 * 2**40, "mean": 2.0**40, "list": [1, 2]}]


def test_no_rows_are_still_valid_json_and_csv(results: Path) -> None:
    found = query(results, "select run_id from trials where false")
    assert json.loads(written(found, "json")) == [] and written(found, "jsonl") == ""
    assert written(found, "csv") == "run_id\n"
    assert written(found, "table").endswith("(0 rows)\n")


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_binary_files_come_back_equal(results: Path, tmp_path: Path, format: str) -> None:
    found = query(results, SAMPLE)
    path = tmp_path / f"out.{format}"
    with path.open("w") as stream:
        write(found, format, stream)
    read = parquet.read_table(path) if format == "parquet" else pa.ipc.open_file(path.read_bytes()).read_all()
    assert read["val_loss"].to_pylist() == [3.5, 3.25, 3.125, None]
    assert read["tokens"].to_pylist() == [2**40] * 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_binary_files_are_not_thrown_at_a_terminal(results: Path, format: str) -> None:
    stream = Terminal()
    with pytest.raises(ConfigError, match=rf"{format} is a binary format: .* > out\.{format}"):
        write(query(results, SAMPLE), format, stream)
    assert stream.getvalue() == ""


def test_an_unknown_format_is_refused(results: Path) -> None:
    with pytest.raises(ConfigError, match="unknown format 'xml'; one of table, csv"):
        write(query(results, SAMPLE), "xml", io.StringIO())
    assert "xml" not in FORMATS


def test_text_is_aligned_and_whole(results: Path) -> None:
    lines = written(query(results, SAMPLE), "table").splitlines()
    assert lines == [
        "candidate_id  val_loss         tokens",
        "------------  --------  -------------",
        "c0                 3.5  1099511627776",
        "c1                3.25  1099511627776",
        "c0               3.125  1099511627776",
        "c1                   -  1099511627776",
        "(4 rows)",
    ]


def test_rows_too_wide_for_a_terminal_become_blocks(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "36")
    stream = Terminal()
    write(query(results, SAMPLE), "table", stream)
    assert stream.getvalue().startswith(
        "-- row 1\ncandidate_id  c0\nval_loss      3.5\ntokens        1099511627776\n"
    )
    monkeypatch.setenv("COLUMNS", "37")
    stream = Terminal()
    write(query(results, SAMPLE), "table", stream)
    assert stream.getvalue().startswith("candidate_id  val_loss")


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("3.3e-5::double", "3.3e-05"),
        ("0.0005::double", "0.0005"),
        ("1e300::double", "1e+300"),
        ("0.0::double", "0"),
        ("123456789.5::double", "123456789.5"),
        ("true", "true"),
        ("null", "-"),
        ("'a' || chr(10) || chr(27) || '[31mb'", "a [31mb"),
        ("timestamptz '2026-01-02 03:04:05+00'", "2026-01-02T03:04:05.000+00:00"),
    ],
)
def test_values_as_text(tmp_path: Path, sql: str, text: str) -> None:
    assert written(query(tmp_path, f"select {sql} as v"), "table").splitlines()[2].strip() == text
