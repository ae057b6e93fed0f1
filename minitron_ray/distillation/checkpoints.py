"""Checkpoints of a distillation: weights and optimizer, loadable at another number of workers.

    <folder>/owner                    which group writes here: the one that began last
    <folder>/partial-<owner>-<step>/  being written, by all ranks
    <folder>/step-00000040/           whole; renamed by rank 0 once every rank has written and synced

A folder that has its final name is whole. Everything else about a run follows from the step number:
the order of the data and the learning rate are functions of it, and no random numbers are drawn.
"""

from __future__ import annotations

import os
import pickle
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.results.files import sync_folder

KEPT = 2
"""Checkpoints kept unless told otherwise: the newest, and one to go back to."""
_FULL = 2**20
"""Bytes below which a disk is."""
_WRITER_NICENESS = 5
"""Of the thread that writes while training goes on: it gets the processor when training leaves it free."""


PATIENCE: Final = timedelta(days=1)
"""For what one rank writes while the others wait: minutes for each 100 GB, on slow storage hours. A rank that is
lost is seen earlier, by its connection or by Ray."""


def saved_steps(folder: Path) -> list[int]:
    """Of the whole checkpoints in a folder, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def newest_sound(folder: Path) -> int:
    """The step of the newest checkpoint in a folder that lost nothing; 0 if there is none. It is the one that is
    gone on from: later ones that lost a file, or part of one, are passed over."""
    return next(sound_steps(folder), 0)


def sound_steps(folder: Path) -> Iterator[int]:
    """Of the checkpoints in a folder that lost nothing, the newest first."""
    return (step for step in reversed(saved_steps(folder)) if _sound(_path(folder, step)))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _sound(path: Path) -> bool:
    """Whether every byte that the metadata tells of is there."""
    try:
        stored = dcp.FileSystemReader(path).read_metadata().storage_data
        sizes = {
            name: (path / name).stat().st_size for name in {one.relative_path for one in stored.values()}
        }
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError):
        return False
    return all(one.offset + one.length <= sizes[one.relative_path] for one in stored.values())


class Superseded(RuntimeError):
    """Another group has taken over: what this one computes must not be written any more."""


class Checkpoints:
    """Saves and loads on all ranks together; rank 0 alone renames and removes.

    Whoever is made last owns the folder: a group that was cut off and lives on can't write into it.
    Every method is called by all ranks, in the same order.
    """

    def __init__(
        self, folder: Path, rank: int, device: torch.device, *, keep: int = KEPT, asynchronous: bool = False
    ) -> None:
        """`device` is the one that trains. `asynchronous`: `save` returns once the state is copied to the CPU's
        memory, and a thread writes it over a process group of its own, since it would mix with training's on
        a shared one.

        Raises EnvironmentFailure where the folder can't be written.
        """
        self._folder, self._leads, self._keep = folder, rank == 0, keep
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._thread = ThreadPoolExecutor(1, "checkpoints", _yield_to_training, (device,))
        self._stager = _stager(device) if asynchronous else None
        self._pending: Future[None] | None = None
        self._owner = self._agree(self._claim)

    def latest(self) -> int:
        """As `newest_sound`, the same on every rank."""
        return self._agree(lambda: newest_sound(self._folder))

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Of what was saved before, waits for the end. Whole under its name when this returns, or, if
        asynchronous, soon after: `failed`, `finish` and the next `save` say if not.

        Raises EnvironmentFailure on every rank where it can't be written: nothing of it is left then, and
        those before it stay.
        """
        self.finish()
        state = _state(model, optimizer)
        if self._stager is None:
            self._write(step, state)
            return
        staged = cast(dict[str, Any], self._stager.stage(state))  # not a future: staging is not asynchronous
        assert isinstance(staged, dict)  # a Future only with asynchronous staging
        self._pending = self._thread.submit(self._write, step, staged)

    def failed(self) -> bool:
        """Whether this rank knows that what is being written can't be: `finish` then says why, on every
        rank. Never waits."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def finish(self) -> None:
        """Waits until what was saved is whole. Raises what `save` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restores model and optimizer in place, whatever the number of workers that saved them."""
        state = _state(model, optimizer)
        path = self._path(step)
        try:
            dcp.load(state, checkpoint_id=path, process_group=self._group)
        except CheckpointException as error:
            raise EnvironmentFailure(
                f"{path}: this checkpoint can't be read: {_first(error)}; remove it to go on from the one before"
            ) from error
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def check_owner(self) -> None:
        """Raises Superseded, on rank 0, where another group has begun to write here."""
        if self._leads and (self._folder / "owner").read_text() != self._owner:
            raise Superseded(f"another group of workers writes to {self._folder}")

    def wait(self) -> None:
        """Until every rank is here, for as long as one of them takes to write a model: on the group that trains
        half an hour is the most, and NCCL's watchdog then ends the processes."""
        dist.barrier(group=self._group)

    def close(self) -> None:
        """After the last `finish`: ends the thread and frees the copies."""
        self._thread.shutdown()
        if self._stager is not None:
            self._stager.close()

    def _claim(self) -> str:
        owner = uuid.uuid4().hex[:12]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob("partial-*"):
                shutil.rmtree(left, ignore_errors=True)
            written = self._folder / f"owner.{owner}"
            written.write_text(owner)
            written.replace(self._folder / "owner")
        except OSError as error:
            raise self._cannot_write(0, error) from error
        return owner

    def _write(self, step: int, state: dict[str, Any]) -> None:
        """All ranks write and sync their files; rank 0 then makes it a checkpoint. In the thread, or not."""
        partial = self._folder / f"partial-{self._owner}-{step:08d}"
        failure: BaseException | None = None
        try:
            dcp.save(
                state,
                storage_writer=dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True),
                process_group=self._group,
            )
        except CheckpointException as error:  # the same on every rank, when all are done writing
            failure = _first(error)
        self._agree(lambda: self._seal(step, partial, failure))

    def _seal(self, step: int, partial: Path, failure: BaseException | None) -> None:
        try:
            if failure is not None:
                raise failure if isinstance(failure, Exception) else RuntimeError(str(failure)) from failure
            sync_folder(partial)
            self.check_owner()
            self._remove(self._path(step))
            partial.rename(self._path(step))
            sync_folder(self._folder)
        except Superseded:
            raise
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._cannot_write(step, error) from error
        # Later ones were passed over when this training began: they are not sound, and would outlive those that are.
        there = saved_steps(self._folder)
        kept = [one for one in there if one <= step][-self._keep :]
        for old in there:
            if old not in kept:
                self._remove(self._path(old))

    def _remove(self, path: Path) -> None:
        """Under its final name it is there as a whole or not at all."""
        if path.exists():
            going = self._folder / f"partial-{self._owner}-old-{path.name}"
            path.rename(going)
            shutil.rmtree(going, ignore_errors=True)

    def _cannot_write(self, step: int, error: BaseException) -> EnvironmentFailure:
        why = str(getattr(error, "strerror", None) or str(error).splitlines()[0]).lower()
        try:
            free = shutil.disk_usage(self._folder).free
            if free < _FULL:
                why = "no space left"  # torch tells of positions in its file
            room = f"{free / 2**30:.1f} GiB are free there"
        except OSError:
            room = "the folder can't be reached"
        last = newest_sound(self._folder)
        kept = f"goes on from step {last}" if last else "begins anew"
        return EnvironmentFailure(
            f"{self._folder}: the checkpoint of step {step} can't be written: {why} ({room}); make room, then "
            f"run the same command again: it {kept}"
        )

    def _agree(self, decide: Callable[[], Any]) -> Any:
        """What rank 0 finds, or raises, on every rank: a folder over a network may look older elsewhere."""
        outcome: list[Any] = [None, None]
        if self._leads:
            try:
                outcome[0] = decide()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _path(self, step: int) -> Path:
        return _path(self._folder, step)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    begun = bool(optimizer.state)
    weights, state = get_state_dict(model, optimizer)
    if not begun:  # torch makes what is not there yet by a step at rate 0, which is none of the training's
        for each in optimizer.state.values():
            each["step"].zero_()
    return {"model": weights, "optimizer": state}


def _stager(device: torch.device) -> DefaultStager:
    """Copies into the same CPU buffers every time; on a GPU these are page-locked."""
    cuda = device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=cuda,
        )
    )


def _yield_to_training(device: torch.device) -> None:
    """What is a thread's own: on Linux its niceness, and everywhere its GPU and stream, of which torch's writer
    takes the current ones and waits for them again and again. Those of a new thread are the first GPU, whoever
    trains there, and the stream on which training is queued."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))
    try:
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + _WRITER_NICENESS)
    except OSError:  # not allowed here: it writes at the same priority
        return


def _first(error: Any) -> BaseException:
    """The first rank's own error out of those that torch gathered."""
    failure: BaseException = error.failures[min(error.failures)][0]
    return failure


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded weights on rank 0's CPU; empty on the others. Every rank must call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights
