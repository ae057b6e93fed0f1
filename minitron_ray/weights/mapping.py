"""`MappedWeights`: a checkpoint's tensors as arrays over its files, whose pages can be asked for and let go.

For passes over weights larger than memory: what was read does not pile up in the resident set, and
what comes next is on its way from the disk.
"""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minitron_ray.core.errors import ConfigError
from minitron_ray.weights.checkpoint import Checkpoint, torch_dtype

if TYPE_CHECKING:
    import torch


class _Span(NamedTuple):
    start: int
    """Bytes from the start of the file."""
    size: int


class MappedWeights:
    """The tensors of a checkpoint, mapped from its files. The files never change.

    Close it, or use it in a `with` block, when no array of it is in use any more.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps: dict[str, mmap.mmap] = {}
        self._spans = {file: _spans(checkpoint.folder / file) for file in checkpoint.files}

    def __enter__(self) -> MappedWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets every file go. Arrays that are still in use keep theirs."""
        maps, self._maps = self._maps, {}
        for mapped in maps.values():
            try:
                mapped.close()
            except BufferError:  # an array of it is in use; it goes with the last one
                continue

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, over the file's pages; writing to it would copy them, and change no file."""
        import torch

        dtype = torch_dtype(self._checkpoint.dtype(name))
        file, span = self._place(name)
        values = span.size // dtype.itemsize
        flat = torch.frombuffer(self._map(file), dtype=dtype, count=values, offset=span.start)
        return flat.reshape(self._checkpoint.shape(name))

    def prefetch(self, name: str, first: int, last: int) -> None:
        """Asks for the rows `first` to `last` (not included) of a tensor; returns at once."""
        self._advise(mmap.MADV_WILLNEED, name, first, last)

    def release(self, name: str, first: int, last: int) -> None:
        """Takes the pages of these rows out of this process's memory; the file system keeps its copy."""
        self._advise(mmap.MADV_DONTNEED, name, first, last)

    def _advise(self, advice: int, name: str, first: int, last: int) -> None:
        file, span = self._place(name)
        row = span.size // max(1, self._checkpoint.shape(name)[0])
        start = (span.start + first * row) // mmap.PAGESIZE * mmap.PAGESIZE
        end = span.start + last * row
        if end > start:
            self._map(file).madvise(advice, start, end - start)

    def _place(self, name: str) -> tuple[str, _Span]:
        file, stored = self._checkpoint.stored_as(name)
        return file, self._spans[file][stored]

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with (self._checkpoint.folder / file).open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def _spans(path: Path) -> dict[str, _Span]:
    """Where each tensor's bytes stand in a safetensors file."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
        entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        return {name: _Span(8 + length + start, end - start) for name, (start, end) in entries.items()}
    except (OSError, ValueError, struct.error, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error
