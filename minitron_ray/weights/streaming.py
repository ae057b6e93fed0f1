"""Files read and written once from end to end, which leave nothing behind in the page cache.

The system reads ahead of a pass and collects its writes, so that it goes at the speed of the disk. What
is left to do here is to say early what is done with: written blocks are sent to the disk at once, not when
memory is full of them, and the pages of other files stay where they are. Reading and writing past the
cache (`O_DIRECT`) waits for the disk at every call, and took about twice as long (`results/LOG.md`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_BLOCK: Final = 8 * 2**20
"""Bytes that are sent to the disk at a time."""
_ON_THE_WAY: Final = 8 * _BLOCK
"""Bytes after which those sent before are taken to have arrived, and are dropped."""


class StreamedFile:
    """A file open for reading at any place, by any number of threads. Close it, or use a `with` block."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file can't be opened."""
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._file).st_size
        _advise(self._file, 0, 0, "POSIX_FADV_SEQUENTIAL")  # to read further ahead

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        _drop(self._file, 0, 0)  # of the whole file: what was read ahead, and pages at the ends of parts
        os.close(self._file)

    def read(self, parts: Iterable[tuple[int, int]], memory: Callable[[int], mmap.mmap]) -> mmap.mmap:
        """Reads `parts`, each from a first byte to a last one (not included), in the order of the file.

        `memory` gives memory of at least so many bytes. The result is that memory; its first byte is that of
        the first part, and what lies between the parts is undefined in it. Raises OSError at a failed read,
        EOFError where the file ends before a part does.
        """
        parts = list(parts)
        start, end = parts[0][0], parts[-1][1]
        buffer = memory(end - start)
        with memoryview(buffer) as view:
            for first, last in parts:
                if last > self._size:
                    raise self._ends(self._size, last)
                while first < last:
                    with view[first - start : last - start] as rest:
                        read = os.preadv(self._file, [rest], first)
                    if read == 0:
                        raise self._ends(first, last)
                    first += read
        _drop(self._file, start, end)
        return buffer

    def _ends(self, at: int, asked: int) -> EOFError:
        return EOFError(f"the file ends at byte {at}, asked was for byte {asked}")


class StreamedOutput:
    """A new file, written from its first byte to its last by one thread. Close it, whole or not."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file can't be made; one of this name is replaced."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._written = self._sent = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets the file go; what `finish` has not put there may be lost."""
        os.close(self._file)

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes. Raises OSError where the disk takes no more."""
        with memoryview(data).cast("B") as rest:
            done = 0
            while done < len(rest):
                done += os.write(self._file, rest[done:])
        self._written += done
        if self._written - self._sent >= _BLOCK:
            # Begins to write the new pages, and drops those that have arrived.
            _drop(self._file, max(0, self._sent - _ON_THE_WAY), self._written)
            self._sent = self._written

    def finish(self) -> None:
        """Returns when all is on the disk. Raises OSError where it can't be."""
        os.fsync(self._file)
        _drop(self._file, 0, self._written)


def _drop(file: int, first: int, last: int) -> None:
    """Takes whole pages out of the cache, but for dirty ones, which it begins to write; up to the end of the file
    where `last` is 0."""
    _advise(file, first, last - first, "POSIX_FADV_DONTNEED")


def _advise(file: int, first: int, size: int, advice: str) -> None:
    """Not every system has this call, and not every file takes it."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, first, size, getattr(os, advice))
