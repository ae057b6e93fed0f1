"""`StoredRows`: some rows of a checkpoint's tensors, read from the files that hold them.

For passes over weights larger than memory: nothing stays behind, neither in this process nor in the
page cache.
"""

from __future__ import annotations

import json
import mmap
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from minitron_ray.core.errors import ConfigError
from minitron_ray.weights.checkpoint import Checkpoint, torch_dtype
from minitron_ray.weights.streaming import StreamedFile

if TYPE_CHECKING:
    import torch


class Span(NamedTuple):
    start: int
    """Bytes from the start of the file."""
    size: int


class StoredRows:
    """The tensors of a checkpoint, row by row, for any number of threads. Close it, or use a `with` block.

    Raises ConfigError, naming the file, where one can't be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._spans = {file: spans(checkpoint.folder / file) for file in checkpoint.files}
        self._files: dict[str, StreamedFile] = {}
        self._opening = threading.Lock()
        self._memory = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def read(self, name: str, runs: Sequence[range]) -> torch.Tensor:
        """The rows of one tensor from the first of `runs` to the last, of which those in none are undefined.

        `runs` are in ascending order, none empty. The tensor is good until this thread's next call.
        """
        import torch

        dtype = torch_dtype(self._checkpoint.dtype(name))
        file, stored = self._checkpoint.stored_as(name)
        start, row = self._spans[file][stored].start, self.row_bytes(name)
        parts = [(start + run.start * row, start + run.stop * row) for run in runs]
        try:
            memory = self._file(file).read(parts, self._buffer)
        except (OSError, EOFError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{self._checkpoint.folder / file} can't be read: {why}; fetch it again"
            ) from error
        rows = runs[-1].stop - runs[0].start
        values = rows * row // dtype.itemsize
        flat = torch.frombuffer(memory, dtype=dtype, count=values)
        return flat.reshape(rows, *self._checkpoint.shape(name)[1:])

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a tensor, as it is stored."""
        file, stored = self._checkpoint.stored_as(name)
        return self._spans[file][stored].size // max(1, self._checkpoint.shape(name)[0])

    def _file(self, name: str) -> StreamedFile:
        with self._opening:
            if name not in self._files:
                self._files[name] = StreamedFile(self._checkpoint.folder / name)
            return self._files[name]

    def _buffer(self, size: int) -> mmap.mmap:
        """This thread's own memory, which grows and is used again."""
        held: mmap.mmap | None = getattr(self._memory, "held", None)
        if held is None or len(held) < size:
            held = self._memory.held = mmap.mmap(-1, size)
        return held


def spans(path: Path) -> dict[str, Span]:
    """Where each tensor's bytes stand in a safetensors file."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
        entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        return {name: Span(8 + length + start, end - start) for name, (start, end) in entries.items()}
    except (OSError, ValueError, struct.error, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error
