"""What a trial needs to go on from a step: weights, optimizer, the rungs so far, and the losses since.

Of a trial in one process it is one file; of a group whose student is in shards, a checkpoint that all
ranks write together, loadable at another number of workers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.serialization import get_crc32_options, set_crc32_options

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.distillation.checkpoints import Checkpoints, sound_steps
from minitron_ray.results.files import write_json
from minitron_ray.weights.headless import Headless


class TrialState(Protocol):
    """`note` is JSON; its `step` tells how far the training was."""

    def save(self, student: Headless, optimizer: Optimizer, note: dict[str, Any]) -> None:
        """Replaces what was kept. Whole when this returns. Raises EnvironmentFailure where it can't be written:
        what was kept before stays."""

    def load(self, student: Headless, optimizer: Optimizer, recipe: str) -> dict[str, Any] | None:
        """Restores both in place and gives the note; None, with nothing changed, where there is nothing
        to go on from: no state, a torn one, or one whose note tells of another `recipe`."""


_TORCH_WRITER: Final = "inline_container.cc"
"""What torch says of a file that it can't write, instead of raising OSError."""
_FULL: Final = 2**20
"""Bytes below which a disk is."""


class FileState:
    """One file, of a trial in one process."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def save(self, student: Headless, optimizer: Optimizer, note: dict[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}.partial")
        state = {"note": note, "student": student.state_dict(), "optimizer": optimizer.state_dict()}
        try:
            with _unchecked():
                torch.save(state, partial)
            partial.replace(self._file)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and _TORCH_WRITER not in str(error):
                raise
            partial.unlink(missing_ok=True)
            raise self._cannot_write(note["step"], error) from error

    def load(self, student: Headless, optimizer: Optimizer, recipe: str) -> dict[str, Any] | None:
        for left in self._file.parent.glob(f"{self._file.name}.*.partial"):
            left.unlink(missing_ok=True)  # of a process that was killed while it wrote
        if not self._file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._file, map_location="cpu", weights_only=True)
        except Exception:  # torch names no type for a file that is not one of its own
            return None
        note: dict[str, Any] = state["note"]
        if note["recipe"] != recipe:
            return None
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        return note

    def _cannot_write(self, step: int, error: OSError | RuntimeError) -> EnvironmentFailure:
        free = shutil.disk_usage(self._file.parent).free
        why = getattr(error, "strerror", None) or (
            "no space left" if free < _FULL else "torch can't write it"
        )
        return EnvironmentFailure(
            f"{self._file}: the state of step {step} can't be written: {why.lower()} ({free / 2**30:.1f} GiB are "
            "free there); make room, then run the same command again"
        )


@contextmanager
def _unchecked() -> Iterator[None]:
    """torch saves without checksums, which take almost half of the processor's time and which `torch.load`
    never looks at."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class ShardedState:
    """A folder that all ranks of a group see. Every rank must call."""

    def __init__(self, folder: Path, rank: int, device: torch.device) -> None:
        self._folder, self._leads = folder, rank == 0
        self._checkpoints = Checkpoints(folder, rank, device)

    def save(self, student: Headless, optimizer: Optimizer, note: dict[str, Any]) -> None:
        """The checkpoint first: one without its note is passed over, while a note that is newer than its
        checkpoint would pass another's weights off as its own."""
        self._checkpoints.save(note["step"], student, optimizer)
        if self._leads:
            write_json(self._note(note["step"]), note)
        dist.barrier()

    def load(self, student: Headless, optimizer: Optimizer, recipe: str) -> dict[str, Any] | None:
        # Rank 0's view: on another node the folder may look older, and all must load the same.
        found = [self._newest(recipe) if self._leads else None]
        dist.broadcast_object_list(found, src=0)
        [note] = found
        if note is not None:
            self._checkpoints.load(note["step"], student, optimizer)
        return note

    def _newest(self, recipe: str) -> dict[str, Any] | None:
        """Of the newest checkpoint that has its note; one that was cut off before it leaves the one before."""
        for step in sound_steps(self._folder):
            try:
                note: dict[str, Any] = json.loads(self._note(step).read_bytes())
            except (OSError, ValueError):
                continue
            return note if note["recipe"] == recipe else None
        return None

    def _note(self, step: int) -> Path:
        return self._folder / f"rungs-{step:08d}.json"
