"""Tokenised in shards: the same bytes as in one go, kept shard by shard, read no further than needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_ray.core.errors import ConfigError, EnvironmentFailure, Interrupted
from minitron_ray.data import reading, tokens
from minitron_ray.data.shards import Here, Work, tokenize_shards
from minitron_ray.data.source import Document, Shard
from minitron_ray.data.sources.files import Files
from minitron_ray.data.sources.mixture import Mixture
from minitron_ray.data.sources.tokens import Tokens
from minitron_ray.data.tokens import TokenStore, build_tokens
from minitron_ray.results.cache import Cache

LENGTH = 16


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is large text."""
    monkeypatch.setattr(reading, "SHARD", 4000)
    monkeypatch.setattr("minitron_ray.data.shards.SHARD", 4000)
    monkeypatch.setattr(tokens, "LARGE", 1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two jsonl files and some txt, 60 kB."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("x", "y"):
        rows = (json.dumps({"text": f"{name} row {n}: " + "word " * (n % 40)}) for n in range(150))
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"Text {number}. " * 300)
    return folder


class Backwards:
    """Does the parts last to first, each alone, and ends the process' work after so many."""

    one_thread = False

    def __init__(self, most: int = 1000) -> None:
        self.done: list[Any] = []
        self.waves: list[int] = []
        self._most = most

    def spread(self, function: Callable[..., Any], parts: Sequence[Any], *arguments: Any) -> list[Any]:
        self.waves.append(len(parts))
        results = []
        for part in reversed(parts):
            if len(self.done) == self._most:
                raise Interrupted("stopped by request")
            results.append(function(part, *arguments, lambda *_, **__: None))
            self.done.append(part[0].identity)
        return results[::-1]


def build(source: Any, model: Path, cache: Cache, base: Path, **more: Any) -> TokenStore:
    return build_tokens(source, model, sequence_length=LENGTH, base=base, cache=cache, **more)


def content(store: TokenStore) -> list[bytes]:
    return [(store.folder / name).read_bytes() for name in ("tokens.arrow", "counts.json", "parts.json")]


def test_shards_of_renamed_files_are_not_taken_for_one_another(
    tmp_path: Path, tiny_llama: Path, cache: Cache, small_shards: None
) -> None:
    """The same texts in the same order, so of one digest, but a name stands for another of them."""
    names = sorted(("a.txt", "b.txt", "c.txt"), key=lambda name: hashlib.sha256(name.encode()).digest())
    folders = []
    for first, second in (names[1:], names[:2]):
        folders.append(tmp_path / f"{first}{second}")
        folders[-1].mkdir()
        (folders[-1] / first).write_text("One text. " * 500)
        (folders[-1] / second).write_text("Quite another. " * 400)
    one, two = (Files(path=str(folder)) for folder in folders)
    assert one.identity(tmp_path, cache) == two.identity(tmp_path, cache)
    whole = build(one, tiny_llama, cache, tmp_path)
    renamed = build(two, tiny_llama, cache, tmp_path, limit_sequences=len(whole) - 1)
    every = range(len(renamed))
    np.testing.assert_array_equal(renamed.sequences(every), whole.sequences(every))


@pytest.mark.parametrize("limit", [None, 301, 1000])
def test_shards_by_anyone_give_the_bytes_of_one_process(
    corpus: Path,
    tiny_llama: Path,
    tmp_path: Path,
    limit: int | None,
    request: pytest.FixtureRequest,
) -> None:
    source = Files(path=str(corpus))
    whole = build(source, tiny_llama, Cache(tmp_path / "a"), corpus, limit_sequences=limit)
    assert not (tmp_path / "a" / ".cache" / "shards").exists()
    request.getfixturevalue("small_shards")
    tasks = Backwards()
    spread = build(source, tiny_llama, Cache(tmp_path / "b"), corpus, limit_sequences=limit, spread=tasks)
    here = build(source, tiny_llama, Cache(tmp_path / "c"), corpus, limit_sequences=limit)
    assert len(tasks.done) >= (2 if limit else 10)
    assert spread.digest == whole.digest == here.digest
    assert content(spread) == content(whole) == content(here)


def test_a_killed_build_goes_on_behind_its_shards(
    corpus: Path, tiny_llama: Path, cache: Cache, small_shards: None
) -> None:
    source = Files(path=str(corpus))
    first, second = Backwards(most=3), Backwards()
    with pytest.raises(Interrupted):
        build(source, tiny_llama, cache, corpus, spread=first)
    assert not list((cache.folder / "tokens").glob("*/tokens.arrow"))
    build(source, tiny_llama, cache, corpus, spread=second)
    every = [shard.identity for shard in source.shards(corpus, cache)]
    assert sorted(map(str, first.done + second.done)) == sorted(map(str, every)) and len(first.done) == 3
    third = Backwards()  # other sequences of the same text are packed without reading it
    build_tokens(source, tiny_llama, sequence_length=8, base=corpus, cache=cache, spread=third)
    assert third.done == []


def test_no_more_is_tokenised_than_needed(
    corpus: Path, tiny_llama: Path, cache: Cache, small_shards: None
) -> None:
    source, tasks = Files(path=str(corpus)), Backwards()
    build(source, tiny_llama, cache, corpus, limit_sequences=100, spread=tasks)
    every = [shard.identity for shard in source.shards(corpus, cache)]
    assert 0 < len(tasks.done) < len(every) / 2
    before = len(tasks.done)
    build(source, tiny_llama, cache, corpus, limit_sequences=1000, spread=tasks)
    assert before < len(tasks.done) <= len(every)
    assert len(set(map(str, tasks.done))) == len(tasks.done)  # what was there was not made again


class Endless(Shard):
    """A stream's file: of no known size, and `read` counts its documents."""

    def __init__(self, number: int) -> None:
        self.number, self.read = number, 0

    @property
    def identity(self) -> Any:
        return self.number

    @property
    def size(self) -> None:
        return None

    def documents(self) -> Iterator[Document]:
        while True:
            self.read += 1
            yield Document(text="A line of the stream, and no end of them. " * 1000, origin="stream")


def test_a_stream_is_left_where_there_is_enough(tiny_llama: Path, cache: Cache) -> None:
    shards, tasks = [Endless(0), Endless(1)], Backwards()

    def work(needed: int) -> Work:
        return Work(text="0" * 64, tokenizer=tiny_llama, cache=cache, length=LENGTH, needed=needed)

    found = tokenize_shards(shards, work(10_000), tasks)
    assert tasks.done == [0] and len(found) == 1 and found[0].tokens >= 10_000
    assert shards[0].read < 60 and shards[1].read == 0  # about a megabyte at a time
    tokenize_shards(shards, work(12_000), tasks)  # inside the same power of two
    assert tasks.done == [0]


class Elsewhere(Backwards):
    """Tasks on nodes with a disk of their own."""

    def spread(self, function: Callable[..., Any], parts: Sequence[Any], *arguments: Any) -> list[Any]:
        other = replace(arguments[0], cache=Cache(self.disk))
        return super().spread(function, parts, other, *arguments[1:])

    def __init__(self, disk: Path) -> None:
        super().__init__()
        self.disk = disk


def test_tasks_that_do_not_see_the_results_folder(
    corpus: Path, tiny_llama: Path, cache: Cache, tmp_path: Path, small_shards: None
) -> None:
    with pytest.raises(EnvironmentFailure, match="every node must see the results folder; put --results on"):
        build(Files(path=str(corpus)), tiny_llama, cache, corpus, spread=Elsewhere(tmp_path / "node"))


def test_a_shard_without_text_and_one_of_another_model(
    tiny_llama: Path, cache: Cache, tmp_path: Path, small_shards: None
) -> None:
    lines = ['{"text": ""}'] * 400 + ['{"text": "some words"}'] * 400
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    store = build(Files(path="a.jsonl"), tiny_llama, cache, tmp_path)
    assert store.counts["documents"] == 400
    small = tmp_path / "model"
    small.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).write_bytes((tiny_llama / name).read_bytes())
    (small / "config.json").write_text(json.dumps({"vocab_size": 20}))
    with pytest.raises(ConfigError, match=r"document 1 of the text holds token id .* has 20 entries"):
        build(Files(path="a.jsonl"), small, cache, tmp_path)


# --- Mixtures -------------------------------------------------------------------------------------------


def mixture(*parts: tuple[float, Any]) -> Mixture:
    return Mixture.model_validate(
        {"parts": [{"weight": weight, "source": source} for weight, source in parts]}
    )


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """a.npy, b.npy: 100 and 40 sequences that say whose they are and which: (source, number, 0...)."""
    for source, (name, rows) in enumerate((("a", 100), ("b", 40))):
        ids = np.zeros((rows, LENGTH), dtype=np.int64)
        ids[:, 0], ids[:, 1] = source, np.arange(rows)
        np.save(tmp_path / f"{name}.npy", ids)
    return tmp_path


def test_a_mixture_keeps_its_shares_from_the_first_sequence_to_the_last(
    marked: Path, tiny_llama: Path, cache: Cache
) -> None:
    source = mixture((3, Tokens(path="a.npy")), (2, Tokens(path="b.npy")))
    store = build(source, tiny_llama, cache, marked)
    rows = store.sequences(range(len(store)))
    for number in (0, 1):  # every part's sequences in its own order, each once
        mine = rows[rows[:, 0] == number, 1]
        assert mine.tolist() == list(range(len(mine)))
    for count in range(1, len(rows) + 1):
        assert abs((rows[:count, 0] == 0).sum() - 0.6 * count) <= 1.5
    # b has 40: it ends there, and nothing is repeated
    assert (rows[:, 0] == 1).sum() == 40 and 98 <= len(rows) <= 101
    assert [part["ended"] for part in store.parts] == [False, True]
    assert [part["sequences"] for part in store.parts] == [len(rows) - 40, 40]
    assert sum(part["tokens"] for part in store.parts) == store.counts["tokens"] == len(rows) * LENGTH


def test_a_longer_mixture_begins_with_the_shorter(marked: Path, tiny_llama: Path, cache: Cache) -> None:
    source = mixture((3, Tokens(path="a.npy")), (1, Tokens(path="b.npy")))
    whole = build(source, tiny_llama, cache, marked)
    for limit in (1, 7, 64):
        some = build(source, tiny_llama, cache, marked, limit_sequences=limit)
        assert len(some) == limit and not any(part["ended"] for part in some.parts)
        assert np.array_equal(some.sequences(range(limit)), whole.sequences(range(limit)))


def test_a_part_of_a_mixture_is_packed_as_it_is_alone(
    corpus: Path, tiny_text: Path, tiny_llama: Path, cache: Cache
) -> None:
    parts = (Files(path=str(corpus)), Files(path=str(tiny_text)))
    mixed = build(mixture((1, parts[0]), (1, parts[1])), tiny_llama, cache, corpus, limit_sequences=400)
    rows = mixed.sequences(range(400))
    for number, source in enumerate(parts):
        alone = build(source, tiny_llama, cache, corpus, limit_sequences=200)
        assert np.array_equal(rows[number::2], alone.sequences(range(200)))
        assert {k: mixed.parts[number][k] for k in alone.counts} == alone.counts


def test_a_mixture_in_shards_is_the_same(
    corpus: Path, tiny_text: Path, tiny_llama: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = mixture((0.7, Files(path=str(corpus))), (0.3, Files(path=str(tiny_text))))
    for limit in (None, 333):
        whole = build(source, tiny_llama, Cache(tmp_path / f"a{limit}"), corpus, limit_sequences=limit)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "SHARD", 4000)
            patch.setattr("minitron_ray.data.shards.SHARD", 4000)
            patch.setattr(tokens, "LARGE", 1)
            sharded = build(
                source,
                tiny_llama,
                Cache(tmp_path / f"b{limit}"),
                corpus,
                limit_sequences=limit,
                spread=Backwards(),
            )
        assert content(sharded) == content(whole)


def test_the_identity_of_a_mixture_is_its_shares_and_texts(
    corpus: Path, tiny_text: Path, tiny_llama: Path, cache: Cache
) -> None:
    a, b = Files(path=str(corpus)), Files(path=str(tiny_text))

    def digest(*parts: tuple[float, Any]) -> str:
        return build(mixture(*parts), tiny_llama, cache, corpus, limit_sequences=50).digest

    assert digest((7, a), (3, b)) == digest((0.7, a), (0.3, b)) != digest((6, a), (4, b))
    assert digest((7, a), (3, b)) != digest((3, b), (7, a))
    assert not mixture((1, a), (1, b)).bounded
    assert mixture((1, a), (1, Files(path="s3://bucket/x.txt"))).bounded


def test_a_mixture_that_ends_too_early_says_whose_fault_it_is(
    marked: Path, tiny_llama: Path, cache: Cache
) -> None:
    source = mixture((1, Tokens(path="a.npy")), (3, Tokens(path="b.npy")))
    expected = (
        r"the text gives 5\d sequences of 16 tokens, 90 are needed; .*; the mixture ends where "
        r"data\.source\.parts\[1\] \(b\.npy\) has no more \(40 sequences\)"
    )
    with pytest.raises(ConfigError, match=expected):
        build(source, tiny_llama, cache, marked, minimum_sequences=90)


def test_here_tells_progress() -> None:
    told: list[dict[str, Any]] = []
    here = Here(report=lambda kind, **fields: told.append({"kind": kind, **fields}))
    assert here.spread(
        lambda part, factor, report: (report("x", done=part), part * factor)[1], [1, 2], 3
    ) == [
        3,
        6,
    ]
    assert told == [{"kind": "x", "done": 1}, {"kind": "x", "done": 2}]
