"""`write_slices`: a Hugging Face model folder written file by file, and gone on with after a kill.

While it is being written, `cut.partial.json` says what goes into the folder, and which weight files
are whole. A file gets its name when all its bytes are on the disk; one that was being written when
the process died is written again. Nothing is hashed: at the speed of a copy, a sha256 of the student
would take as long as all the rest.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from minitron_ray.core.errors import ConfigError
from minitron_ray.results.files import cannot_write, make_folder, remove_temporaries, sync_folder, write_json
from minitron_ray.weights.slicing import Slice
from minitron_ray.weights.streaming import StreamedOutput
from minitron_ray.weights.writing import Shard

if TYPE_CHECKING:
    import torch

PROGRESS: Final = "cut.partial.json"
_WAITING: Final = 24
"""Slices cut but not yet written: enough that neither side waits for the other's hiccups."""

Report = Callable[[int, int], None]
"""Called with the bytes that are done, of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What an unfinished folder says of itself."""

    fingerprint: str
    """Digest of all that decides the content of the weight files."""
    whole: frozenset[str]
    """Names of the weight files that are whole."""


def read_progress(folder: Path) -> Progress | None:
    """None where no write was begun, or it has come to its end."""
    try:
        found = json.loads((folder / PROGRESS).read_bytes())
        return Progress(fingerprint=found["fingerprint"], whole=frozenset(found["whole"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, which is made if needed, free of what a killed process was writing beside its weights.

    Raises ConfigError where another process holds it.
    """
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_temporaries(folder)
        yield
    except BlockingIOError:
        raise ConfigError(f"{folder} is being written by another process; wait for it, or stop it") from None
    finally:
        os.close(handle)


def write_slices(
    folder: Path,
    shards: list[Shard],
    slices: Callable[[Set[str]], Iterable[Slice]],
    *,
    fingerprint: str,
    report: Report,
) -> None:
    """Writes the weight files that are not whole yet.

    `slices` gives the slices of the tensors it is asked for, tensor by tensor in the order of
    `shards`, row by row. `PROGRESS` stays in the folder: who called removes it when all the rest of
    the folder is there. Raises EnvironmentFailure where the folder can't be written; whatever `slices`
    raises; RuntimeError where it gives other tensors than `shards` says.
    """
    known = read_progress(folder)
    known_whole = known.whole if known is not None and known.fingerprint == fingerprint else frozenset()
    done = {shard.file for shard in shards if shard.file in known_whole and is_whole(folder, shard)}
    todo = [shard for shard in shards if shard.file not in done]
    _clear(folder, keep=done)
    _Writer(folder, fingerprint, done, sum(shard.size for shard in shards), report).write(todo, slices)


class _Writer:
    """Three at work: the caller's thread cuts, one writes, one waits for the disk."""

    def __init__(self, folder: Path, fingerprint: str, done: set[str], total: int, report: Report) -> None:
        self.folder, self.fingerprint, self.done = folder, fingerprint, done
        self.total, self.report, self.written = total, report, 0

    def write(self, shards: list[Shard], slices: Callable[[Set[str]], Iterable[Slice]]) -> None:
        self.written = self.total - sum(shard.size for shard in shards)
        self._note()
        wanted = {name for shard in shards for name in shard.places}
        try:
            self._all(shards, iter(slices(wanted)))
        finally:  # both threads are at their end: what has no name of its own yet never will have
            for part in self.folder.glob("*.part"):
                part.unlink(missing_ok=True)

    def _all(self, shards: list[Shard], stream: Iterator[Slice]) -> None:
        with ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as settling:
            settled: list[Future[None]] = []
            for shard in shards:
                settled.append(self._shard(shard, stream, writing, settling))
            if (extra := next(stream, None)) is not None:
                raise RuntimeError(f"{extra.name} is no tensor of the config, or was given twice")
            for future in settled:
                future.result()

    def _shard(
        self, shard: Shard, stream: Iterator[Slice], writing: ThreadPoolExecutor, settling: ThreadPoolExecutor
    ) -> Future[None]:
        part = self.folder / f"{shard.file}.part"
        try:
            file = StreamedOutput(part)
        except OSError as error:
            raise cannot_write(part, error) from error
        pending: deque[Future[None]] = deque([writing.submit(self._put, file, shard.header)])
        try:
            for one in _in_order(shard, stream):
                pending.append(writing.submit(self._put, file, one))
                if len(pending) > _WAITING:
                    pending[0].result()
                    pending.popleft()
            for future in pending:
                future.result()
        except BaseException as error:
            for future in pending:
                future.cancel()
            wait(pending)  # the one that was already running
            file.close()
            if isinstance(error, OSError):
                raise cannot_write(part, error) from error
            raise
        return settling.submit(self._settle, shard, file, part)

    def _put(self, file: StreamedOutput, values: bytes | torch.Tensor) -> None:
        if isinstance(values, bytes):
            file.write(values)
            return
        file.write(_bytes(values))
        self.written += values.nbytes
        self.report(self.written, self.total)

    def _settle(self, shard: Shard, file: StreamedOutput, part: Path) -> None:
        try:
            with file:
                file.finish()
            part.replace(self.folder / shard.file)
            sync_folder(self.folder)
        except OSError as error:
            raise cannot_write(part, error) from error
        self.done.add(shard.file)
        self._note()

    def _note(self) -> None:
        write_json(self.folder / PROGRESS, {"fingerprint": self.fingerprint, "whole": sorted(self.done)})


def _in_order(shard: Shard, stream: Iterator[Slice]) -> Iterator[torch.Tensor]:
    """The shard's slices, checked to fill each of its tensors, one after the other."""
    for name, place in shard.places.items():
        rows = 0
        while rows < place.shape[0]:
            one = next(stream, None)
            if one is None or (one.name, one.first) != (name, rows):
                given = "nothing" if one is None else f"row {one.first} of {one.name}"
                raise RuntimeError(f"row {rows} of {name} is to be written, given was {given}")
            if tuple(one.values.shape[1:]) != place.shape[1:] or rows + len(one.values) > place.shape[0]:
                raise RuntimeError(
                    f"{name} has rows {tuple(one.values.shape)}, the config implies {place.shape}"
                )
            rows += len(one.values)
            yield one.values


def _bytes(values: torch.Tensor) -> memoryview:
    import torch

    return values.reshape(-1).view(torch.uint8).numpy().data


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether the file is there with its header and in its full length."""
    try:
        with (folder / shard.file).open("rb") as file:
            header = file.read(len(shard.header))
            return header == shard.header and os.fstat(file.fileno()).st_size == len(header) + shard.size
    except OSError:
        return False


def discard(folder: Path) -> None:
    """Removes what an unfinished write left behind."""
    _clear(folder, keep=())
    (folder / PROGRESS).unlink(missing_ok=True)


def _clear(folder: Path, keep: Container[str]) -> None:
    """Removes weight files that are not whole or not of this cut."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.part")]:
        if path.name not in keep:
            path.unlink(missing_ok=True)
