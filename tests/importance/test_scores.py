"""`Scores` through the table `importance` and back, whatever was scored and in whatever order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from minitron_ray.core.errors import ConfigError, MinitronError
from minitron_ray.importance.scores import Scores
from minitron_ray.results.schemas import TABLES
from minitron_ray.results.store import Store

ARRAYS = ("hidden", "heads", "kv_heads", "mlp", "experts", "expert_mlp", "layers")


def drawn(seed: int = 0, **changed: Any) -> Scores:
    """A mixture of experts with every axis scored, and blocks of 2 and 3 layers."""
    source = np.random.default_rng(seed)
    values = {
        "hidden": source.normal(size=7),
        "heads": source.normal(size=(4, 6)),
        "kv_heads": source.normal(size=(4, 2)),
        "mlp": source.normal(size=(4, 5)),
        "experts": source.normal(size=(4, 3)),
        "expert_mlp": source.normal(size=(4, 3, 2)),
        "layers": source.normal(size=4),
        "blocks": {2: source.normal(size=3), 3: source.normal(size=2)},
    }
    return Scores(**(values | changed))


def assert_equal(one: Scores, other: Scores) -> None:
    for name in ARRAYS:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs)
    assert one.blocks.keys() == other.blocks.keys()
    for length, values in one.blocks.items():
        np.testing.assert_array_equal(values, other.blocks[length])


def stored(tmp_path: Path, *scored: tuple[Scores, str, str]) -> pa.Table:
    """The rows of several metrics as the store gives them back, in random order."""
    store = Store(tmp_path, "x", "y")
    for number, (scores, width, depth) in enumerate(scored):
        store.append("importance", scores.rows(width, depth), writer="importance", sequence=number)
    table = store.read("importance")
    return table.take(np.random.default_rng(0).permutation(len(table)))


def test_everything_that_can_be_scored_comes_back(tmp_path: Path) -> None:
    scores = drawn()
    assert_equal(Scores.from_table(stored(tmp_path, (scores, "w", "d"))), scores)


@pytest.mark.parametrize("axis", ["kv_heads", "mlp", "experts", "expert_mlp"])
def test_an_axis_that_was_not_scored_is_none(axis: str, tmp_path: Path) -> None:
    scores = drawn(**{axis: None})
    assert_equal(Scores.from_table(stored(tmp_path, (scores, "w", "d"))), scores)


def test_every_score_is_one_row_that_says_what_it_is_of() -> None:
    scores = drawn()
    rows = list(scores.rows("w", "d"))
    assert len(rows) == 7 + 4 * (6 + 2 + 5 + 3 + 3 * 2) + 4 + 3 + 2
    assert all(list(row) == TABLES["importance"].names for row in rows)
    assert {row["metric"] for row in rows if row["axis"] == "layers"} == {"d"}
    assert {row["metric"] for row in rows if row["axis"] != "layers"} == {"w"}
    assert {(row["expert"], row["length"]) for row in rows if row["axis"] == "heads"} == {(-1, 1)}
    assert {row["layer"] for row in rows if row["axis"] == "hidden"} == {-1}
    (neuron,) = [
        r for r in rows if (r["axis"], r["layer"], r["expert"], r["unit"]) == ("expert_mlp", 3, 2, 1)
    ]
    assert scores.expert_mlp is not None and neuron["score"] == scores.expert_mlp[3, 2, 1]
    (block,) = [row for row in rows if (row["layer"], row["length"]) == (1, 3)]
    assert (block["axis"], block["unit"], block["score"]) == ("layers", 1, scores.blocks[3][1])


def test_the_table_has_the_same_rows() -> None:
    table = drawn().table("w", "d")
    assert table.schema == TABLES["importance"] and table.to_pylist() == list(drawn().rows("w", "d"))


def test_metrics_are_told_apart_by_their_labels(tmp_path: Path) -> None:
    first, second = drawn(1), drawn(2)
    table = stored(tmp_path, (first, "w1", "d1"), (second, "w2", "d2"))
    assert_equal(Scores.from_table(table, "w1", "d1"), first)
    assert_equal(Scores.from_table(table, "w2", "d2"), second)
    mixed = Scores.from_table(table, "w1", "d2")
    np.testing.assert_array_equal(mixed.heads, first.heads)
    np.testing.assert_array_equal(mixed.layers, second.layers)
    with pytest.raises(ConfigError, match=r"scores hidden by 2 metrics \(w1, w2\); name the one to rank by"):
        Scores.from_table(table)
    with pytest.raises(ConfigError, match=r"no score of hidden by metric 'w3'; it has w1, w2"):
        Scores.from_table(table, "w3", "d1")
    with pytest.raises(ConfigError, match=r"no score of layers by metric 'd3'; it has d1, d2"):
        Scores.from_table(table, "w1", "d3")


def test_units_alone_or_blocks_alone(tmp_path: Path) -> None:
    """A further width metric brings no layers; removal of blocks alone brings no single layers."""
    whole, more = drawn(1), drawn(2, layers=np.full(4, np.nan), blocks={})
    table = stored(tmp_path / "a", (whole, "w1", "d"), (more, "w2", "none"))
    assert_equal(Scores.from_table(table, "w1", "d"), whole)
    np.testing.assert_array_equal(Scores.from_table(table, "w2", "d").heads, more.heads)
    blocks = drawn(layers=np.full(4, np.nan))
    assert_equal(Scores.from_table(stored(tmp_path / "b", (blocks, "w", "d"))), blocks)


def test_a_table_without_layers_says_so(tmp_path: Path) -> None:
    table = stored(tmp_path, (drawn(layers=np.full(4, np.nan), blocks={}), "w", "d"))
    with pytest.raises(ConfigError, match="the importance table has no score of layers; score it again"):
        Scores.from_table(table)


def test_tables_of_older_versions_are_read(tmp_path: Path) -> None:
    """Neither column at all (a table at hand), nor in the fragment (the store fills in nulls)."""
    scores = drawn(kv_heads=None, experts=None, expert_mlp=None, blocks={})
    old = stored(tmp_path / "new", (scores, "w", "d")).drop_columns(["expert", "length"])
    assert_equal(Scores.from_table(old), scores)
    folder = tmp_path / "old" / "tables" / "importance"
    folder.mkdir(parents=True)
    with pa.ipc.new_file(folder / "importance-00000000.arrow", old.schema) as writer:
        writer.write_table(old)
    read = Store(tmp_path / "old", "x", "y").read("importance")
    assert read["expert"].null_count == len(read)
    assert_equal(Scores.from_table(read), scores)


@pytest.mark.parametrize(("change", "count"), [(np.delete, 23), (np.insert, 25)])
def test_missing_and_doubled_rows(change: Any, count: int) -> None:
    table = drawn().table("w", "d")
    head = 7 + 2  # of the first layer, after the hidden channels
    rows = np.arange(len(table))
    chosen = change(rows, head) if change is np.delete else change(rows, head, head)
    with pytest.raises(MinitronError, match=rf"has {count} scores of heads, 4 x 6 are needed"):
        Scores.from_table(table.take(chosen))


def test_millions_of_rows_take_seconds(tmp_path: Path) -> None:
    """As many as the experts of a 30B mixture have neurons, a quarter of them here."""
    source = np.random.default_rng(0)
    scores = drawn(expert_mlp=source.normal(size=(12, 128, 1140)), experts=source.normal(size=(12, 128)))
    store = Store(tmp_path, "x", "y")
    store.append("importance", scores.table("w", "d"), writer="importance", sequence=0)
    table = store.read("importance")
    start = time.process_time()
    back = Scores.from_table(table)
    assert time.process_time() - start < 2 and len(table) > 1_750_000
    assert_equal(back, scores)
