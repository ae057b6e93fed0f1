"""Checkpoints of a distillation: weights, optimizer and step, loadable at another number of workers.

    <folder>/step-00000040/   written under a temporary name by all ranks, renamed by rank 0

A folder that has its final name is whole. Everything else about a run follows from the step number.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

KEPT = 2
"""Checkpoints kept: the newest, and one to go back to by hand."""


class Checkpoints:
    """Saves and loads on all ranks together; rank 0 alone renames and removes."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._leads = folder, rank == 0

    def latest(self) -> int:
        """The newest whole checkpoint's step; 0 if there is none."""
        steps = [int(path.name.removeprefix("step-")) for path in self._whole()]
        return max(steps, default=0)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Whole under its name when this returns, on every rank. Saving a step again replaces it."""
        temporary, final = self._folder / f"partial-{step:08d}", self._path(step)
        if self._leads:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        dcp.save(_state(model, optimizer), checkpoint_id=temporary)
        dist.barrier()
        if self._leads:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            for old in sorted(self._whole())[:-KEPT]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restores model and optimizer in place."""
        state = _state(model, optimizer)
        dcp.load(state, checkpoint_id=self._path(step))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _whole(self) -> list[Path]:
        return list(self._folder.glob("step-*"))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded weights on rank 0's CPU; empty on the others. Every rank must call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights
