"""Object stores: found and read like local files, only as far as needed, and named by their listing."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from minitron_ray.core.errors import ConfigError, EnvironmentFailure
from minitron_ray.data import reading
from minitron_ray.data.sources.files import Files
from minitron_ray.data.tokens import build_tokens
from minitron_ray.results.cache import Cache
from tests.data.object_store import Bucket, served


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """With the bucket `texts`: 3 txt, 1 jsonl, 1 parquet, and what is no text."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    folder = tmp_path / "store" / "texts"
    for name in ("a", "deep/b", "deep/er/c"):
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Text {name}. " * 50, encoding="utf-8")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"row {n}"}) for n in range(3)))
    pq.write_table(pa.table({"text": ["cell 0", "cell 1"]}), folder / "deep" / "cells.parquet")
    (folder / "notes.md").write_text("not read of a folder")
    with served(tmp_path / "store") as bucket:
        yield bucket


def texts(source: Files, cache: Cache) -> dict[str, str]:
    return {document.origin: document.text for document in source.documents(Path("/nowhere"), cache)}


def test_a_bucket_reads_like_the_folder(bucket: Bucket, cache: Cache, tmp_path: Path) -> None:
    remote = Files(path=f"s3://texts?{bucket.options}")
    local = Files(path=str(tmp_path / "store" / "texts"))
    assert list(texts(remote, cache).items()) == list(texts(local, cache).items())
    assert len(texts(remote, cache)) == 8
    assert texts(Files(path=f"{(tmp_path / 'store' / 'texts').as_uri()}"), cache) == texts(local, cache)
    assert remote.bounded and not local.bounded


def test_patterns_reach_into_a_bucket(bucket: Bucket, cache: Cache) -> None:
    for pattern, names in (
        ("**/*.txt", {"a.txt", "deep/b.txt", "deep/er/c.txt"}),
        ("deep/*.txt", {"b.txt"}),
        ("deep/**/*.txt", {"b.txt", "er/c.txt"}),
        ("a.txt", {"a.txt"}),
        ("[an]*.[mt]*", {"a.txt", "notes.md"}),
    ):
        assert set(texts(Files(path=f"s3://texts/{pattern}?{bucket.options}"), cache)) == names, pattern


def test_the_listing_names_it_and_nothing_is_read_for_that(bucket: Bucket, cache: Cache) -> None:
    source = Files(path=f"s3://texts/**/*.txt?{bucket.options}")
    identity = source.identity(Path("/here"), cache)
    assert identity == Files(path=f"s3://texts/**/*.txt?{bucket.options}").identity(Path("/there"), cache)
    assert bucket.bytes_sent == 0 and not source.by_content
    (bucket.folder / "texts" / "a.txt").write_text("Another, longer or shorter text.")
    assert source.identity(Path("/here"), cache) != identity


def test_a_store_of_a_bucket_is_that_of_its_text(
    bucket: Bucket, cache: Cache, tiny_llama: Path, tmp_path: Path
) -> None:
    """Wherever the text lies, equal tokens have an equal digest; and it is read once."""
    options = {"sequence_length": 16, "base": tmp_path, "limit_sequences": 20}
    first = build_tokens(
        Files(path=f"s3://texts/**/*.txt?{bucket.options}"), tiny_llama, cache=cache, **options
    )
    sent = bucket.bytes_sent
    assert sent > 0
    again = build_tokens(
        Files(path=f"s3://texts/**/*.txt?{bucket.options}"), tiny_llama, cache=cache, **options
    )
    assert again.folder == first.folder and bucket.bytes_sent == sent
    shutil.copytree(bucket.folder / "texts", bucket.folder / "elsewhere" / "copy")
    other = Cache(tmp_path / "other")
    moved = build_tokens(
        Files(path=f"s3://elsewhere/copy/**/*.txt?{bucket.options}"), tiny_llama, cache=other, **options
    )
    assert moved.digest == first.digest
    for path in (bucket.folder / "texts").rglob("*.txt"):
        path.write_text("Quite another text. " * 60)
    changed = build_tokens(
        Files(path=f"s3://texts/**/*.txt?{bucket.options}"), tiny_llama, cache=cache, **options
    )
    assert changed.digest != first.digest


def test_a_large_object_is_read_in_ranges(
    bucket: Bucket, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of lines and of row groups give every document once, in order, alone or pickled."""
    monkeypatch.setattr(reading, "SHARD", 1000)
    lines = "\n".join(json.dumps({"text": f"line {n} " + "x" * (n % 97)}) for n in range(200))
    (bucket.folder / "texts" / "lines.jsonl").write_text(lines + "\n")
    cells = pa.table({"text": [f"cell {n} " + "y" * (n % 89) for n in range(200)]})
    pq.write_table(cells, bucket.folder / "texts" / "table.parquet", row_group_size=7, compression="none")
    for name in ("lines.jsonl", "table.parquet"):
        source = Files(path=f"s3://texts/{name}?{bucket.options}")
        shards = [pickle.loads(pickle.dumps(shard)) for shard in source.shards(Path(), cache)]
        found = [document.text for shard in shards for document in shard.documents()]
        assert len(shards) > 5 and [text.split()[1] for text in found] == [str(n) for n in range(200)]
    last = list(shards[-1].documents())
    assert last[-1].origin == "table.parquet:200"


def test_what_is_compressed(tmp_path: Path, cache: Cache) -> None:
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
    (tmp_path / "d.txt.bz2").write_bytes(bz2.compress(b"three"))
    for name in ("a.jsonl.gz", "b.json.gz", "c.jsonl.zst"):
        assert list(texts(Files(path=str(tmp_path / name)), cache).values()) == ["one", "two"], name
    assert texts(Files(path=str(tmp_path / "d.txt.bz2")), cache) == {"d.txt.bz2": "three"}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-12])
    with pytest.raises(EnvironmentFailure, match=r"a\.jsonl\.gz can't be read: "):
        texts(Files(path=str(tmp_path / "a.jsonl.gz")), cache)


def test_a_store_that_refuses_or_has_nothing(bucket: Bucket, cache: Cache) -> None:
    with pytest.raises(ConfigError, match=r"no file fits s3://texts/\*\.pdf.*`\*` stays inside a folder"):
        Files(path=f"s3://texts/*.pdf?{bucket.options}").identity(Path(), cache)
    bucket.refuse = True
    with pytest.raises(EnvironmentFailure, match=r"s3://texts/a.* can't be listed: .*credentials") as caught:
        Files(path=f"s3://texts/a.txt?{bucket.options}").identity(Path(), cache)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("s3://key:secret@bucket/a.txt", "a key in it would be stored with the run"),
        ("s3://bucket/a.txt?region=x&secret_key=y", "a key in it would be stored with the run"),
        ("ftp://place/a.txt", r"begins with ftp://, known are s3://, gs://, file://$"),
        ("pypi://m==1/a.txt", "for a package's files use kind: pypi"),
    ],
)
def test_addresses_of_no_use(path: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem.removesuffix("$")):
        Files(path=path)


def test_text_that_did_not_change_is_not_read_again(tmp_path: Path, cache: Cache) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"A text of some length, {name}.")
    source = Files(path=str(tmp_path / "*.txt"))
    before = source.identity(tmp_path, cache)
    assert not (cache.folder / "digests").exists()  # written just now: it may change within its clock's tick

    def written(name: str, seconds: int) -> None:
        os.utime(tmp_path / f"{name}.txt", (seconds, seconds))

    written("a", 1_000_000_000), written("b", 1_000_000_000)
    assert source.identity(tmp_path, cache) == before
    kept = list((cache.folder / "digests").glob("*/sha256"))
    assert len(kept) == 1  # of all files at once, however many there are
    kept[0].write_text("0" * 64)  # what it says is taken for true: no file is read
    assert source.identity(tmp_path, cache)["content"] == "0" * 64
    written("b", 1_000_000_001)
    assert source.identity(tmp_path, cache) == before
    (tmp_path / "b.txt").write_text("A text of some length, c.")
    written("b", 1_000_000_002)
    assert source.identity(tmp_path, cache) not in (before, {"content": "0" * 64, "column": "text"})


def test_a_large_file_is_not_read_again_where_another_changed(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LARGE", 30)
    large, small = tmp_path / "large.txt", tmp_path / "small.txt"
    large.write_text("A text of more than thirty characters."), small.write_text("Another.")
    os.utime(large, (1_000_000_000, 1_000_000_000)), os.utime(small, (1_000_000_000, 1_000_000_000))
    source = Files(path=str(tmp_path / "*.txt"))
    source.identity(tmp_path, cache)
    [kept] = [
        done.with_name("sha256")
        for done in (cache.folder / "digests").glob("*/DONE.json")
        if json.loads(done.read_text())["bytes"] == large.stat().st_size
    ]
    kept.write_text("0" * 64)
    small.write_text("Another, changed.")
    os.utime(small, (1_000_000_000, 1_000_000_000))
    taken_for_true = source.identity(tmp_path, cache)
    shutil.rmtree(cache.folder)
    assert source.identity(tmp_path, cache) != taken_for_true
