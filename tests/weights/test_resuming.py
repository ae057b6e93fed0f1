"""A folder written file by file: whole files are kept, everything else is written again, and the bytes are the same."""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitron_ray.core.errors import ConfigError
from minitron_ray.weights.resuming import PROGRESS, locked, read_progress, write_slices
from minitron_ray.weights.slicing import Slice
from minitron_ray.weights.writing import Shard, layout

SHAPES = {"a": (6, 4), "b": (3, 5), "c": (7,), "d": (2, 8)}
TENSORS = {
    name: torch.arange(torch.Size(shape).numel()).reshape(shape).float() + number
    for number, (name, shape) in enumerate(SHAPES.items())
}


def shards() -> list[Shard]:
    found = layout(SHAPES, "float32", 4, 100)
    assert [list(shard.places) for shard in found] == [["a"], ["b", "c"], ["d"]]
    return found


class Source:
    """Slices of `TENSORS`, two rows each; stops in front of one tensor with an error, where asked."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.stop_at, self.given = stop_at, set[str]()

    def __call__(self, names: Set[str]) -> Iterator[Slice]:
        for name, values in TENSORS.items():
            if name not in names:
                continue
            if name == self.stop_at:
                raise KeyboardInterrupt
            self.given.add(name)
            for first in range(0, len(values), 2):
                yield Slice(name, first, values[first : first + 2].clone())


def write(folder: Path, source: Source, fingerprint: str = "f") -> None:
    write_slices(folder, shards(), source, fingerprint=fingerprint, report=lambda done, total: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_what_is_written(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    write_slices(tmp_path, shards(), Source(), fingerprint="f", report=lambda *told: heard.append(told))
    loaded = {
        name: value for path in tmp_path.glob("*.safetensors") for name, value in load_file(path).items()
    }
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    progress = read_progress(tmp_path)
    assert progress is not None and progress.whole == set(contents(tmp_path))
    assert heard[-1] == (sum(4 * t.numel() for t in TENSORS.values()),) * 2
    assert not list(tmp_path.glob("*.part"))


def test_going_on_redoes_no_whole_file(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", Source())
    folder = tmp_path / "cut"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        write(folder, Source(stop_at="c"))
    assert list(contents(folder)) == [shards()[0].file]
    second = Source()
    write(folder, second)
    assert second.given == {"b", "c", "d"}
    assert contents(folder) == contents(tmp_path / "whole")
    assert list(contents(folder)) == [shard.file for shard in shards()]
    third = Source()
    write(folder, third)
    assert not third.given


@pytest.mark.parametrize("damage", ["shorter", "header", "gone"])
def test_a_file_that_is_not_whole_is_written_again(tmp_path: Path, damage: str) -> None:
    write(tmp_path, Source())
    expected = contents(tmp_path)
    path = tmp_path / shards()[1].file
    if damage == "gone":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(expected[path.name][:-1])
    else:
        path.write_bytes(b"\0" * 16 + expected[path.name][16:])
    source = Source()
    write(tmp_path, source)
    assert source.given == {"b", "c"}
    assert contents(tmp_path) == expected


def test_another_cut_starts_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, Source(stop_at="d"))
    assert read_progress(tmp_path) is not None
    source = Source()
    write(tmp_path, source, fingerprint="g")
    assert source.given == set(TENSORS)
    progress = read_progress(tmp_path)
    assert progress is not None and progress.fingerprint == "g" and len(progress.whole) == 3


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"fingerprint": "f"}', b"\xff"])
def test_progress_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PROGRESS).write_bytes(content)
    assert read_progress(tmp_path) is None


@pytest.mark.parametrize("wrong", ["missing", "order", "columns", "rows", "extra"])
def test_other_tensors_than_planned(tmp_path: Path, wrong: str) -> None:
    right = list(Source()(set(TENSORS)))
    b = next(one for one in right if one.name == "b")
    place = right.index(b)
    given, message = {
        "missing": (
            [*right[:place], *right[place + 2 :]],
            r"row 0 of b is to be written, given was row 0 of c",
        ),
        "order": ([right[1], right[0], *right[2:]], "row 0 of a is to be written, given was row 2 of a"),
        "columns": (
            [*right[:place], Slice("b", 0, b.values[:, :4])],
            r"b has rows \(2, 4\), the config implies",
        ),
        "rows": (
            [*right[:place], Slice("b", 0, torch.zeros(4, 5))],
            r"b has rows \(4, 5\), the config implies",
        ),
        "extra": ([*right, Slice("e", 0, b.values)], "e is no tensor of the config, or was given twice"),
    }[wrong]
    with pytest.raises(RuntimeError, match=message):
        write_slices(tmp_path, shards(), lambda names: given, fingerprint="f", report=lambda *told: None)


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with (
        locked(folder),
        pytest.raises(ConfigError, match="is being written by another process"),
        locked(folder),
    ):
        pass
    with locked(folder):
        pass


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = tmp_path / f".cut.partial.json.{'0a' * 16}.tmp"
    others = [tmp_path / ".mine.tmp", tmp_path / "cut.partial.json", tmp_path / f"notes.{'0a' * 16}.tmp"]
    for path in (left, *others):
        path.write_bytes(b"{")
    with locked(tmp_path):
        assert sorted(tmp_path.iterdir()) == sorted(others)
