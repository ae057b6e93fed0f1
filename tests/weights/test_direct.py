"""The bytes are those of ordinary reads and writes, wherever they begin and end, direct access or not."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
from pathlib import Path

import pytest

from minitron_ray.weights import direct
from minitron_ray.weights.direct import ALIGNMENT, DirectFile, DirectOutput

BLOCK = 8 * 2**20
needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct access")


def memory(size: int) -> mmap.mmap:
    return mmap.mmap(-1, max(size, ALIGNMENT))


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that opens files for direct access, and then takes no such read or write."""

    def unless_direct(call):
        def refuse(file, *given):
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(file, *given)

        return refuse

    monkeypatch.setattr(direct.os, "preadv", unless_direct(os.preadv))
    monkeypatch.setattr(direct.os, "write", unless_direct(os.write))


def check_reads(path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    source = random.Random(0)
    with DirectFile(path) as file:
        for _ in range(50):
            ends = sorted(source.sample(range(size + 1), 2 * source.randint(1, min(4, size // 2))))
            parts = list(zip(ends[::2], ends[1::2], strict=True))
            found, base = file.read(parts, memory)
            for first, last in parts:
                assert found[first - base : last - base] == content[first:last]
        with pytest.raises(EOFError, match=f"ends at byte {size}, asked was for byte {size + 1}"):
            file.read([(0, size + 1)], memory)


@pytest.mark.parametrize("size", [10, ALIGNMENT, 3 * ALIGNMENT + 7, 100_003])
def test_parts_are_those_of_the_file(tmp_path: Path, size: int) -> None:
    check_reads(tmp_path / "file", size)


def check_writes(path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    source, at = random.Random(0), 0
    with DirectOutput(path) as file:
        while at < size:
            step = source.choice([1, 8, 5000, 3 * 2**20])
            file.write(memoryview(content)[at : at + step])
            at += step
        file.finish()
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 1, ALIGNMENT, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 12_345])
def test_a_file_is_what_was_written(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"longer than what replaces it" * 10)
    check_writes(tmp_path / "file", size)


@needs_direct
@pytest.mark.usefixtures("refusing")
def test_a_file_system_that_refuses_is_read_and_written_all_the_same(tmp_path: Path) -> None:
    check_reads(tmp_path / "read", 100_003)
    check_writes(tmp_path / "written", BLOCK + 12_345)


@needs_direct
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_a_file_system_in_memory() -> None:
    path = Path("/dev/shm") / f"minitron-ray-{os.getpid()}"
    try:
        check_reads(path, 100_003)
        check_writes(path, BLOCK + 12_345)
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_not_a_shorter_file() -> None:
    with DirectOutput(Path("/dev/full")) as file:
        file.write(b"x")
        with pytest.raises(OSError, match="No space left"):
            file.finish()


def test_a_sound_refusal_is_told(tmp_path: Path) -> None:
    """Only a refusal of direct access is tried again, and only once."""
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        DirectOutput(tmp_path)
