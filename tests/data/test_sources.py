"""Every source keeps the contract; files, rows and data sets are read as written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from minitron_ray.core.errors import ConfigError, EnvironmentFailure
from minitron_ray.core.kinds import plugins
from minitron_ray.data.hub import documents_of
from minitron_ray.data.source import MixedSource, Source, TextSource, TokenSource
from minitron_ray.data.sources.files import Files
from minitron_ray.data.sources.hub import Hub
from minitron_ray.data.sources.tokens import Tokens
from minitron_ray.results.cache import Cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_every_source_says_what_it_gives() -> None:
    found = plugins("minitron_ray.data.sources")
    assert list(found) == ["files", "hub", "mixture", "pypi", "tokens"]
    for cls in found.values():
        assert issubclass(cls, Source) and cls.__doc__
        assert sum(issubclass(cls, base) for base in (TextSource, TokenSource, MixedSource)) == 1


def test_a_folder_in_an_order_of_names_alone(tiny_text: Path, cache: Cache) -> None:
    documents = list(Files(path=tiny_text.name).documents(tiny_text.parent, cache))
    origins = [document.origin for document in documents]
    assert len(origins) == 6 and set(origins) == {
        p.relative_to(tiny_text).as_posix() for p in tiny_text.rglob("*.txt")
    }
    assert origins != sorted(origins)  # topics are mixed
    pattern = list(Files(path=str(tiny_text / "**" / "*.txt")).documents(Path("/nowhere"), cache))
    assert pattern == documents


def test_identity_is_content_and_order_not_place(tmp_path: Path, cache: Cache) -> None:
    for place in ("a", "b"):
        for name in ("x.txt", "y.txt"):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / name).write_text(name)
    one, other = Files(path="a"), Files(path="./b/*.txt")
    assert one.identity(tmp_path, cache) == other.identity(tmp_path, cache)
    before = one.identity(tmp_path, cache)
    (tmp_path / "a" / "x.txt").write_text("y.txt")
    (tmp_path / "a" / "y.txt").write_text("x.txt")
    assert one.identity(tmp_path, cache) != before


def test_wildcards_in_the_experiment_folder_are_plain_text(tmp_path: Path, cache: Cache) -> None:
    base = tmp_path / "run[1]"
    base.mkdir()
    (base / "a.txt").write_text("A")
    assert [d.text for d in Files(path="*.txt").documents(base, cache)] == ["A"]


def test_rows_keep_their_order_and_blank_ones_are_left_out(tmp_path: Path, cache: Cache) -> None:
    texts = ["one", "", None, "  \n", "zwei — 二"]
    lines = "\n\n".join(json.dumps({"text": text, "n": 1}) for text in texts)
    (tmp_path / "rows.jsonl").write_text(lines)
    pq.write_table(pa.table({"n": [1] * 5, "text": texts}), tmp_path / "rows.parquet")
    for name, place in (("rows.jsonl", 9), ("rows.parquet", 5)):
        documents = list(Files(path=name).documents(tmp_path, cache))
        assert [d.text for d in documents] == ["one", "zwei — 二"]
        assert documents[-1].origin == f"{name}:{place}"


def test_halves_of_surrogate_pairs_are_replaced(tmp_path: Path, cache: Cache) -> None:
    """JSON can write them; whole pairs are the character."""
    (tmp_path / "cut.jsonl").write_text(
        '{"text": "ab \\ud83d"}\n{"text": "\\ud83d\\ude00 \\ude00 \\u2014"}\n'
    )
    texts = [document.text for document in Files(path="cut.jsonl").documents(tmp_path, cache)]
    assert texts == ["ab \ufffd", "\U0001f600 \ufffd —"]


def test_text_that_is_not_unicode_names_its_file(tmp_path: Path, cache: Cache) -> None:
    texts = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"text": texts}), tmp_path / "bad.parquet")
    with pytest.raises(
        ConfigError, match=r"bad\.parquet can't be read as parquet: .*it is damaged, fetch it again"
    ):
        list(Files(path="bad.parquet").documents(tmp_path, cache))


def test_text_as_found_on_windows(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "a.md").write_bytes("\ufeffone\r\ntwo".encode())
    assert [d.text for d in Files(path="a.md").documents(tmp_path, cache)] == ["one\ntwo"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 \(byte 3\); convert it"),
        ("a.csv", b"x,y", r"a\.csv is not a text file; give txt, jsonl or parquet"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: not a line of JSON"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl:1: no column 'text' \(found: body\)"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: no column 'text' \(found: none\)"),
        ("a.jsonl", b'{"text": [1]}', r"a\.jsonl:1: column 'text' holds list, not text"),
        ("a.parquet", b"PAR1", r"a\.parquet can't be read as parquet"),
    ],
)
def test_bad_files(tmp_path: Path, cache: Cache, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=problem):
        list(Files(path=name).documents(tmp_path, cache))


def test_a_parquet_file_without_the_column(tmp_path: Path, cache: Cache) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet: no column 'text' \(found: body\); name it with"):
        list(Files(path="a.parquet").documents(tmp_path, cache))


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nothing", "no such file or folder: .*nothing; relative paths start"),
        ("empty", "no text in folder .*empty; it must hold .txt"),
        ("**/*.md", r"no file fits .*\.md"),
    ],
)
def test_nothing_to_read(tmp_path: Path, cache: Cache, path: str, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=problem):
        Files(path=path).identity(tmp_path, cache)


ROWS = np.arange(24).reshape(3, 8)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "stream.arrow", "jsonl", "npy"])
def test_token_rows_of_every_format(tmp_path: Path, cache: Cache, suffix: str) -> None:
    path = tmp_path / f"tokens.{suffix}"
    table = pa.table({"n": [1, 2, 3], "input_ids": pa.array(ROWS.tolist(), pa.list_(pa.int32()))})
    if suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "npy":
        np.save(path, ROWS.astype(np.uint16))
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    else:
        new = pa.ipc.new_stream if "stream" in suffix else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    rows = list(Tokens(path=path.name).sequences(tmp_path, cache))
    assert np.array_equal(rows, ROWS) and rows[0].dtype == np.int64


def test_bad_token_files(tmp_path: Path, cache: Cache) -> None:
    np.save(tmp_path / "flat.npy", ROWS.ravel())
    np.save(tmp_path / "float.npy", ROWS.astype(np.float32))
    np.save(tmp_path / "object.npy", np.array([[{}]]), allow_pickle=True)
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2.5]}')
    (tmp_path / "a.txt").write_text("1 2 3")
    (tmp_path / "a.arrow").write_bytes(b"ARROW1..")
    problems = {
        "flat.npy": r"has the shape \(sequences, tokens\), not \(24,\)",
        "float.npy": r"float\.npy:1: 'input_ids' must be a list of token ids",
        "object.npy": r"object\.npy can't be read as npy",
        "a.jsonl": r"a\.jsonl:1: 'input_ids' must be a list of token ids",
        "a.txt": r"read from parquet, arrow, jsonl and npy, not from '\.txt'",
        "a.arrow": r"a\.arrow can't be read as arrow",
        "none.npy": r"no such file: .*none\.npy",
    }
    for name, problem in problems.items():
        with pytest.raises(ConfigError, match=problem):
            list(Tokens(path=name).sequences(tmp_path, cache))


def test_rows_of_a_data_set() -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": None}, {"text": " "}, {"text": "b"}])
    found = list(documents_of(rows.to_iterable_dataset(), "text", "owner/name (default, train)"))
    assert [(d.text, d.origin[-2:]) for d in found] == [("a", ":1"), ("b", ":4")]
    with pytest.raises(ConfigError, match=r"owner/name has no column 'body' \(found: text\)"):
        list(documents_of(rows, "body", "owner/name"))
    with pytest.raises(ConfigError, match="column 'text' holds int, not text"):
        list(documents_of([{"text": 3}], "text", "owner/name"))


def test_a_data_set_is_read_file_by_file(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library streams three local files in place of the hub's."""
    import datasets

    for name in "abc":
        rows = (json.dumps({"text": f"{name}{n}"}) for n in range(4))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    load = datasets.load_dataset

    def stream(*_: object, **__: object) -> datasets.IterableDataset:
        return load("json", data_files=files, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", stream)
    source = Hub(path="owner/name", revision=COMMIT)
    shards = [pickle.loads(pickle.dumps(shard)) for shard in source.shards(Path(), cache)]
    found = [[document.text for document in shard.documents()] for shard in shards]
    assert found == [[f"{name}{n}" for n in range(4)] for name in "abc"]
    assert [shard.size for shard in shards] == [None] * 3
    assert next(shards[1].documents()).origin == "owner/name (default, train) file 2:1"
    assert len({str(shard.identity) for shard in shards}) == 3 and source.bounded


def test_a_hub_that_is_out_of_reach_is_one_line(cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    source = Hub(path="owner/no-such-data-set", revision=COMMIT)
    with pytest.raises(
        EnvironmentFailure, match=r"data set owner/no-such-data-set .* HF_HUB_OFFLINE"
    ) as caught:
        list(source.documents(Path(), cache))
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")
    assert source.identity(Path(), cache)["revision"] == COMMIT


def test_a_folder_named_like_the_data_set_is_not_read(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="a local folder is named owner/name like the data set"):
        list(Hub(path="owner/name", revision=COMMIT).documents(tmp_path, cache))


def test_a_hub_source_needs_a_commit() -> None:
    with pytest.raises(ValidationError, match="revision"):
        Hub(path="owner/name")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="revision"):
        Hub(path="owner/name", revision="main")
