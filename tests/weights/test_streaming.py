"""The bytes are those of ordinary reads and writes, wherever they begin and end, and none stay in the page cache."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from pathlib import Path

import pytest

from minitron_ray.weights.streaming import StreamedFile, StreamedOutput

BLOCK = 8 * 2**20
PAGE = mmap.PAGESIZE


def memory(size: int) -> mmap.mmap:
    return mmap.mmap(-1, max(size, 1))


def check_reads(path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    source = random.Random(0)
    with StreamedFile(path) as file:
        for _ in range(50):
            ends = sorted(source.sample(range(size + 1), 2 * source.randint(1, min(4, size // 2))))
            parts = list(zip(ends[::2], ends[1::2], strict=True))
            found, base = file.read(parts, memory), parts[0][0]
            for first, last in parts:
                assert found[first - base : last - base] == content[first:last]
        with pytest.raises(EOFError, match=f"ends at byte {size}, asked was for byte {size + 1}"):
            file.read([(0, size + 1)], memory)


@pytest.mark.parametrize("size", [10, PAGE, 3 * PAGE + 7, 100_003])
def test_parts_are_those_of_the_file(tmp_path: Path, size: int) -> None:
    check_reads(tmp_path / "file", size)


def test_a_file_that_has_become_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    with StreamedFile(path) as file:
        os.truncate(path, 60)
        with pytest.raises(EOFError, match="ends at byte 60, asked was for byte 90"):
            file.read([(50, 90)], memory)


def check_writes(path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    source, at = random.Random(0), 0
    with StreamedOutput(path) as file:
        while at < size:
            step = source.choice([1, 8, 5000, 3 * 2**20])
            file.write(memoryview(content)[at : at + step])
            at += step
        file.finish()
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 1, PAGE, BLOCK - 1, BLOCK, BLOCK + 1, 10 * BLOCK + 12_345])
def test_a_file_is_what_was_written(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"longer than what replaces it" * 10)
    check_writes(tmp_path / "file", size)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_a_file_system_in_memory() -> None:
    path = Path("/dev/shm") / f"minitron-ray-{os.getpid()}"
    try:
        check_reads(path, 100_003)
        check_writes(path, BLOCK + 12_345)
    finally:
        path.unlink(missing_ok=True)


def test_a_system_that_takes_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have no such call, some file systems refuse it."""

    def refuse(file: int, first: int, size: int, advice: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    check_reads(tmp_path / "read", 100_003)
    check_writes(tmp_path / "written", BLOCK + 12_345)
    monkeypatch.delattr(os, "posix_fadvise")
    check_reads(tmp_path / "read", 100_003)
    check_writes(tmp_path / "written", BLOCK + 12_345)


def cached(path: Path) -> int:
    """Bytes of a file in the page cache, as util-linux' `fincore` counts them."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture
def dropping(tmp_path: Path) -> None:
    """A file system whose pages the system counts, keeps, and lets go when it is told to."""
    path = tmp_path / "probe"
    path.write_bytes(bytes(2**20))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        try:
            before = cached(path)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            after = cached(path)
        except (FileNotFoundError, AttributeError):
            pytest.skip("needs fincore and posix_fadvise")
    if (before, after) != (2**20, 0):
        pytest.skip("this file system keeps other pages")


@pytest.mark.usefixtures("dropping")
def test_nothing_stays_in_the_page_cache(tmp_path: Path) -> None:
    """Neither at the ends of parts, which are no pages' ends, nor what was read ahead."""
    path, size, step = tmp_path / "file", 12 * BLOCK, 2 * 2**20 + 1234
    with StreamedOutput(path) as output:
        for _ in range(12):
            output.write(random.Random(0).randbytes(BLOCK))
        output.finish()
    assert cached(path) == 0
    path.read_bytes()
    assert cached(path) > size * 0.9
    with StreamedFile(path) as file:
        for first in range(0, size // 2, step):
            file.read([(first, first + step)], memory)
        assert cached(path) < size * 0.8  # larger folios at the ends of parts stay until it is closed
    assert cached(path) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_not_a_shorter_file() -> None:
    with StreamedOutput(Path("/dev/full")) as file, pytest.raises(OSError, match="No space left"):
        file.write(b"x")


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StreamedFile(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        StreamedOutput(tmp_path)
