"""What a trial needs to go on past a rung: weights, optimizer, and the rungs so far.

Of a trial in one process it is one file; of a group whose student is in shards, a checkpoint that all
ranks write together, loadable at another number of workers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.serialization import get_crc32_options, set_crc32_options

from minitron_ray.distillation.checkpoints import Checkpoints
from minitron_ray.results.files import write_json
from minitron_ray.weights.headless import Headless


class TrialState(Protocol):
    """`note` is JSON; its `step` tells how far the training was."""

    def save(self, student: Headless, optimizer: Optimizer, note: dict[str, Any]) -> None:
        """Replaces what was kept. Whole when this returns, or not there."""

    def load(self, student: Headless, optimizer: Optimizer, recipe: str) -> dict[str, Any] | None:
        """Restores both in place and gives the note; None, with nothing changed, where there is nothing
        to go on from: no state, a torn one, or one whose note tells of another `recipe`."""


class FileState:
    """One file, of a trial in one process."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def save(self, student: Headless, optimizer: Optimizer, note: dict[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}.partial")
        state = {"note": note, "student": student.state_dict(), "optimizer": optimizer.state_dict()}
        checked = get_crc32_options()
        # `torch.load` never looks at the checksums, which take almost half of the processor's time.
        set_crc32_options(False)
        try:
            torch.save(state, partial)
        finally:
            set_crc32_options(checked)
        partial.replace(self._file)

    def load(self, student: Headless, optimizer: Optimizer, recipe: str) -> dict[str, Any] | None:
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


class ShardedState:
    """A folder that all ranks of a group see. Every rank must call."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._leads = folder, rank == 0
        self._checkpoints = Checkpoints(folder, rank)

    def save(self, student: Headless, optimizer: Optimizer, note: dict[str, Any]) -> None:
        """The checkpoint first: one without its note is as good as none."""
        self._checkpoints.save(note["step"], student, optimizer)
        if self._leads:
            write_json(self._note(note["step"]), note)
        dist.barrier()

    def load(self, student: Headless, optimizer: Optimizer, recipe: str) -> dict[str, Any] | None:
        step = self._checkpoints.latest()
        try:
            note: dict[str, Any] = json.loads(self._note(step).read_bytes())
        except (OSError, ValueError):
            return None
        if note["recipe"] != recipe:
            return None
        self._checkpoints.load(step, student, optimizer)
        return note

    def _note(self, step: int) -> Path:
        return self._folder / f"rungs-{step:08d}.json"
