"""Files read and written past the page cache, where the file system lets them.

A pass over more bytes than there is memory, each touched once, gains nothing from the page cache and
pays for it: a copy of every byte, and the pages of everybody else. Where `O_DIRECT` is refused (some
network and memory file systems), the same calls go through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

ALIGNMENT: Final = 4096
"""Bytes, of which places, lengths and memory must be multiples: the sector size of every disk divides it."""
_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_BLOCK: Final = 8 * 2**20
"""Bytes written at a time."""


class DirectFile:
    """A file open for reading at any place, by any number of threads. Close it, or use a `with` block."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file can't be opened."""
        self._file = _opened(path, os.O_RDONLY)
        self._size = os.fstat(self._file).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def read(
        self, parts: Iterable[tuple[int, int]], memory: Callable[[int], mmap.mmap]
    ) -> tuple[mmap.mmap, int]:
        """Reads `parts`, each from a first byte to a last one (not included), in the order of the file.

        `memory` gives page-aligned memory of at least so many bytes. The result is that memory, and the
        byte of the file that its first byte stands for; what lies between the parts is undefined in it.
        Raises OSError at a failed read, EOFError where the file ends before a part does.
        """
        parts = list(parts)
        base = parts[0][0] // ALIGNMENT * ALIGNMENT
        buffer = memory(_rounded_up(parts[-1][1]) - base)
        with memoryview(buffer) as view:
            for first, last in parts:
                if last > self._size:
                    raise EOFError(f"the file ends at byte {self._size}, asked was for byte {last}")
                self._fill(view, base, first // ALIGNMENT * ALIGNMENT, last)
        return buffer, base

    def _fill(self, view: memoryview, base: int, at: int, last: int) -> None:
        while at < last:
            with view[at - base : _rounded_up(last) - base] as rest:
                read = _even_through_the_cache(self._file, os.preadv, [rest], at)
            if read == 0:
                raise EOFError(f"the file ends at byte {at}, asked was for byte {last}")
            # A read that ends within a sector has met the end of the file.
            at = at + read if at + read >= last else (at + read) // ALIGNMENT * ALIGNMENT


class DirectOutput:
    """A new file, written from its first byte to its last by one thread. Close it, whole or not."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file can't be made; one of this name is replaced."""
        self._file = _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._block = mmap.mmap(-1, _BLOCK)
        self._bytes = np.frombuffer(self._block, dtype=np.uint8)
        self._used = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets the file go; what `finish` has not put there is lost."""
        os.close(self._file)

    def write(self, data: bytes | memoryview | np.ndarray) -> None:
        """Appends bytes. Raises OSError, at this call or a later one, where the disk takes no more."""
        rest = np.frombuffer(data, dtype=np.uint8)
        while len(rest):
            taken = min(len(rest), _BLOCK - self._used)
            np.copyto(self._bytes[self._used : self._used + taken], rest[:taken])
            self._used += taken
            rest = rest[taken:]
            if self._used == _BLOCK:
                self._put(_BLOCK)

    def finish(self) -> None:
        """Writes what is left, and returns when all is on the disk. Raises OSError where it can't be."""
        _through_the_cache(self._file)  # the last bytes fill no sector
        self._put(self._used)
        os.fsync(self._file)

    def _put(self, size: int) -> None:
        with memoryview(self._block) as view:
            done = 0
            while done < size:
                with view[done:size] as rest:
                    done += _even_through_the_cache(self._file, os.write, rest)
                if done % ALIGNMENT:  # cut short, as at a full disk: the next try says why, from any place
                    _through_the_cache(self._file)
        self._used = 0


def _opened(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags | os.O_CLOEXEC, 0o666)


def _even_through_the_cache(file: int, call: Callable[..., int], *given: Any) -> int:
    """`call(file, *given)`; where the file system refuses that, again without direct access, now and from now on."""
    try:
        return call(file, *given)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    _through_the_cache(file)
    return call(file, *given)


def _through_the_cache(file: int) -> None:
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT)


def _rounded_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
