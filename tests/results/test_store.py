"""Fragments: whole or absent, one a name, readable while others write."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.results.schemas import TABLES, full_schema
from minitron_ray.results.store import Store, read_table


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "exp" / "run1", "exp", "run1")


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"candidate_id": "c", "step": number, "tokens": 8 * number, "loss": 1.0 / number} | more


def test_rows_come_back_with_envelope_and_nulls(store: Store) -> None:
    store.append("steps", [step(1), step(2, val_loss=float("nan"))], writer="w", sequence=0)
    read = store.read("steps")
    assert read.schema.equals(full_schema("steps"), check_metadata=True)
    first, second = read.to_pylist()
    assert (first["experiment"], first["run_id"], first["step"], first["tokens"]) == ("exp", "run1", 1, 8)
    assert first["val_loss"] is None and np.isnan(second["val_loss"])


def test_a_table_nobody_wrote_is_empty_with_all_columns(store: Store, tmp_path: Path) -> None:
    for table in TABLES:
        assert store.read(table).schema.equals(full_schema(table)) and store.read(table).num_rows == 0
        assert read_table(tmp_path, table).num_rows == 0


def test_the_same_name_replaces_and_other_names_add(store: Store) -> None:
    store.append("steps", [step(1), step(2)], writer="w", sequence=0)
    store.append("steps", [step(3)], writer="w", sequence=1)
    store.append("steps", [step(1), step(2)], writer="w", sequence=0)
    assert store.read("steps")["step"].to_pylist() == [1, 2, 3]
    assert store.has("steps", "w", 1) and not store.has("steps", "w", 2) and not store.has("steps", "v", 1)


def test_times_may_be_seconds_or_datetimes(store: Store) -> None:
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    store.append("stages", [{"at": noon}, {"at": noon.timestamp()}], writer="w", sequence=0)
    assert store.read("stages")["at"].to_pylist() == [noon, noon]


def test_numpy_scalars_are_values(store: Store) -> None:
    row = {"step": np.int64(3), "loss": np.float32(0.5), "candidate_id": np.str_("c")}
    store.append("steps", [row], writer="w", sequence=0)
    read = store.read("steps").to_pylist()[0]
    assert (read["step"], read["loss"], read["candidate_id"]) == (3, 0.5, "c")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"setp": 1}, "table steps has no column 'setp'; it has"),
        ({"run_id": "other"}, "table steps has no column 'run_id'"),
        ({"step": "one"}, r"table steps, column step \(int64\)"),
        ({"step": 1.5}, r"column step \(int64\): 1.5 is not whole"),
        ({"step": True}, r"column step \(int64\)"),
        ({"loss": "low"}, r"column loss \(double\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    store: Store, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        store.append("steps", [step(1), row], writer="w", sequence=0)
    assert not store.folder.exists()


def test_unknown_tables_and_names_that_leave_the_folder_are_refused(store: Store) -> None:
    with pytest.raises(KeyError, match="stps"):
        store.append("stps", [], writer="w", sequence=0)
    with pytest.raises(ValueError, match="cannot name a writer"):
        store.append("steps", [], writer="../w", sequence=0)
    with pytest.raises(ValueError, match="sequence -1 is negative"):
        store.append("steps", [], writer="w", sequence=-1)


def test_stray_temporaries_are_not_rows(store: Store) -> None:
    store.append("steps", [step(1)], writer="w", sequence=0)
    folder = store.folder / "tables" / "steps"
    (folder / ".w-00000001.arrow.abc.tmp").write_bytes(b"half")
    assert store.read("steps").num_rows == 1


def test_a_damaged_fragment_is_named(store: Store) -> None:
    store.append("steps", [step(1)], writer="w", sequence=0)
    path = store.folder / "tables" / "steps" / "w-00000000.arrow"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(EnvironmentFailure, match=r"w-00000000\.arrow: not a readable Arrow file"):
        store.read("steps")


def test_fragments_of_an_older_schema_are_filled_with_nulls(store: Store) -> None:
    folder = store.folder / "tables" / "steps"
    folder.mkdir(parents=True)
    old = pa.table({"experiment": ["exp"], "run_id": ["run0"], "step": pa.array([7], pa.int64())})
    with pa.ipc.new_file(str(folder / "old-00000000.arrow"), old.schema) as writer:
        writer.write_table(old)
    store.append("steps", [step(8)], writer="new", sequence=0)
    read = store.read("steps")
    assert read.schema.equals(full_schema("steps"))
    assert {row["step"]: row["tokens"] for row in read.to_pylist()} == {7: None, 8: 64}


def test_all_runs_are_read_together(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "second" / "run2", "second", "run2")
    store.append("steps", [step(1)], writer="w", sequence=0)
    other.append("steps", [step(2)], writer="w", sequence=0)
    rows = read_table(tmp_path, "steps").to_pylist()
    assert [(row["experiment"], row["run_id"], row["step"]) for row in rows] == [
        ("exp", "run1", 1),
        ("second", "run2", 2),
    ]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 9)), max_size=12))
def test_any_order_of_appends_leaves_the_last_of_every_name(
    tmp_path_factory: pytest.TempPathFactory, appends: list[tuple[str, int, int]]
) -> None:
    store = Store(tmp_path_factory.mktemp("run"), "exp", "run")
    for writer, sequence, value in appends:
        store.append("steps", [step(1, tokens=value)], writer=writer, sequence=sequence)
    expected = {(writer, sequence): value for writer, sequence, value in appends}
    assert store.read("steps")["tokens"].to_pylist() == [expected[name] for name in sorted(expected)]


def test_a_store_can_be_pickled(store: Store) -> None:
    copy = pickle.loads(pickle.dumps(store))
    copy.append("steps", [step(1)], writer="w", sequence=0)
    assert store.read("steps").num_rows == 1


def test_no_write_permission_is_one_line(store: Store, tmp_path: Path) -> None:
    (tmp_path / "exp").write_text("a file where the folder should be")
    with pytest.raises(EnvironmentFailure, match=r"^cannot write to .*run1/tables/steps: .*--results"):
        store.append("steps", [step(1)], writer="w", sequence=0)


WRITER = """
import sys
from pathlib import Path
from minitron_ray.results.store import Store
store = Store(Path(sys.argv[1]), "exp", "run1")
for n in range(int(sys.argv[3])):
    rows = [{"candidate_id": sys.argv[2], "step": 10 * n + i} for i in range(10)]
    store.append("steps", rows, writer=sys.argv[2], sequence=n)
    print(n, flush=True)
"""


def start_writer(store: Store, name: str, appends: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(store.folder), name, str(appends)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_processes_write_and_a_reader_reads_at_the_same_time(store: Store) -> None:
    writers = [start_writer(store, name, 30) for name in ("a", "b")]
    seen = []
    while any(writer.poll() is None for writer in writers):
        seen.append(store.read("steps").num_rows)
    for writer in writers:
        assert writer.communicate()[0] and writer.returncode == 0
    assert all(count % 10 == 0 for count in seen), "a fragment was read in part"
    assert seen == sorted(seen)
    steps = store.read("steps").group_by("candidate_id").aggregate([("step", "count_distinct")])
    assert sorted(row["step_count_distinct"] for row in steps.to_pylist()) == [300, 300]


def test_a_killed_writer_loses_nothing_it_had_committed(store: Store) -> None:
    writer = start_writer(store, "a", 1_000_000)
    assert writer.stdout is not None
    lines = [writer.stdout.readline() for _ in range(20)]
    os.kill(writer.pid, signal.SIGKILL)
    rest = writer.communicate()[0]
    committed = [int(line) for line in [*lines, *rest.split()] if line.strip()]
    read = store.read("steps")["step"].to_pylist()
    assert read[: 10 * len(committed)] == list(range(10 * len(committed)))
    assert len(read) in (10 * len(committed), 10 * len(committed) + 10)


def test_threads_rewriting_one_name_never_show_half_of_it(store: Store) -> None:
    store.append("steps", [step(1)] * 50, writer="w", sequence=0)
    until = time.monotonic() + 0.5

    def rewrite() -> None:
        while time.monotonic() < until:
            store.append("steps", [step(1)] * 50, writer="w", sequence=0)

    threads = [threading.Thread(target=rewrite) for _ in range(2)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        assert store.read("steps").num_rows == 50
    for thread in threads:
        thread.join()
    assert [path.name for path in (store.folder / "tables" / "steps").iterdir()] == ["w-00000000.arrow"]
