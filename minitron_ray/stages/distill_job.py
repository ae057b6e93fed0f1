"""What each worker of a distillation does: shard the student, train it, save it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import AdamW

from minitron_ray.distillation.checkpoints import Checkpoints, newest_sound, whole_weights
from minitron_ray.distillation.loop import MOST_SKIPPED, Recipe, Share, Step, make_optimizer, train
from minitron_ray.distillation.teacher import OnlineTeacher
from minitron_ray.execution.settings import CheckpointSettings
from minitron_ray.execution.train_group import Again, Worker
from minitron_ray.experiment import Distill
from minitron_ray.importance.scores import Scores
from minitron_ray.plan import distilled_tokens
from minitron_ray.plan.tokens import interval
from minitron_ray.results.store import Store
from minitron_ray.search.space import Candidate
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.step_log import StepLog
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import unstacked
from minitron_ray.weights.writing import write_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillJob:
    """One student's distillation. Picklable."""

    setting: Setting
    scores: Scores
    candidate: Candidate
    folder: Path
    """Holds `checkpoints/` while it runs, and `final/` when it is done."""
    store: Store
    checkpoints: CheckpointSettings
    stage: str = "distill"
    """The stage that it is of, for events and the names of fragments."""
    rehearsal: bool = False
    """Whether a group that began at the first step ends at a checkpoint, for another to go on from it."""

    @property
    def distill(self) -> Distill:
        distill = self.setting.experiment.distill
        assert distill is not None
        return distill

    @property
    def recipe(self) -> Recipe:
        distill = self.distill
        recipe = self.setting.recipe(distill, distill.tokens, distill.loss)
        return replace(recipe, intermediate=self.setting.intermediate(distill, self.candidate.layers))

    def every(self, tokens: int | None, parts: int) -> int:
        """Optimizer steps between two events: so many tokens, or `parts` times in all."""
        return interval(self.distill, tokens, parts, self.setting.experiment.data.sequence_length)

    @property
    def writer(self) -> str:
        """Of its rows in `steps`."""
        return f"{self.stage}-{self.candidate.id}"

    def saved(self) -> int:
        """The step that the next group goes on from, for one who is not of a group; 0 without a checkpoint."""
        return newest_sound(self.folder / "checkpoints")


def distill_worker(job: DistillJob, worker: Worker) -> dict[str, Any] | Again:
    """Runs on every rank; returns `step`, `tokens` and whether the user stopped it before the end. `Again`
    where something else ended it at a checkpoint."""
    step = job.recipe.steps if _is_written(job) else _Distillation(job, worker).run()
    if step < job.recipe.steps and not worker.stopped_by_user():
        reason = "a recovery is rehearsed" if job.rehearsal else "a worker was told to end"
        reason = "there is room for more" if worker.regroup_requested() else reason
        return Again(f"{reason}: stopped at step {step}")
    batch_tokens = job.recipe.batch * job.recipe.sequence_length
    return {"step": step, "tokens": step * batch_tokens, "interrupted": step < job.recipe.steps}


def _is_written(job: DistillJob) -> bool:
    """Whether a group that was lost after that had the student written already: as rank 0 sees it, since a
    folder over a network may look older elsewhere."""
    found = [(job.folder / "final").exists()]
    dist.broadcast_object_list(found)
    return found[0]


class _Distillation:
    """Training, with the bookkeeping around each step."""

    def __init__(self, job: DistillJob, worker: Worker) -> None:
        setting = job.setting
        self._job, self._worker = job, worker
        self._share: Share = setting.share(worker.rank, worker.world, worker.device)
        self._student: Headless = setting.sharded_student(job.candidate, job.scores, self._share, job.distill)
        self._optimizer: AdamW = make_optimizer(self._student, job.recipe)
        distill = job.distill
        self._teacher: OnlineTeacher | None = None
        if distill.needs_teacher:
            self._teacher = setting.online_teacher(self._share)
        self._checkpoints = Checkpoints(
            job.folder / "checkpoints",
            worker.rank,
            worker.device,
            keep=job.checkpoints.keep,
            asynchronous=job.checkpoints.asynchronous,
        )
        self._checkpoint_every = job.every(distill.checkpoint_every, 10)
        self._validate_every = job.every(distill.validate_every, 4)
        self._log = StepLog(
            setting,
            job.candidate,
            self._share,
            teacher=None if self._teacher is None else "online",
            stage=job.stage,
            total=distilled_tokens(setting.experiment),
            report=worker.report,
        )
        self._skipped = 0

    def run(self) -> int:
        """Trains from the newest checkpoint to the end; returns the last step made."""
        job, last, first = self._job, self._job.recipe.steps, self._resume()
        data = job.setting.training_data(job.recipe.batch)
        for step in train(
            self._student,
            self._optimizer,
            self._teacher,
            data,
            job.recipe,
            self._share,
            first_step=first + 1,
            stop_requested=self._stop_requested,
            skipped=self._skipped,
        ):
            self._record(step, validate=step.step % self._validate_every == 0 or step.step == last)
            if step.skipped > MOST_SKIPPED:
                self._write_rows()  # no checkpoint: `train` is about to raise
                continue
            if step.step % self._checkpoint_every == 0 or step.stop_requested or step.step == last:
                self._save(step.step)
                rehearsed = job.rehearsal and not first and step.step >= 2 * self._checkpoint_every
                if step.step < last and (step.stop_requested or rehearsed or self._regroup()):
                    self._checkpoints.finish()
                    self._checkpoints.close()
                    return step.step
        self._finish()
        return last

    def _stop_requested(self) -> bool:
        """Also where a checkpoint could not be written: the loss carries it to all ranks, which then raise in
        the same step, at `_save`."""
        return self._worker.stop_requested() or self._checkpoints.failed()

    def _resume(self) -> int:
        """The step of the checkpoint that is gone on from, 0 for none. Rows of later steps go: these will be
        made again."""
        first = self._checkpoints.latest()
        if first:
            self._checkpoints.load(first, self._student, self._optimizer)
        if self._worker.rank == 0:
            self._job.store.remove("steps", self._job.writer, first + 1)
        if first:
            found = [0]
            if self._worker.rank == 0:
                found = [self._log.go_on(self._job.store.read("steps").to_pylist(), first)]
            dist.broadcast_object_list(found)
            self._skipped = found[0]
        return first

    def _regroup(self) -> bool:
        """Whether rank 0 heard that the group is to begin again with more workers."""
        wish = torch.tensor([float(self._worker.regroup_requested())], device=self._worker.device)
        dist.all_reduce(wish)
        return bool(wish.item() > 0)

    def _record(self, step: Step, validate: bool) -> None:
        setting = self._job.setting
        self._log.add(step, setting.measure(self._student, self._share, self._teacher) if validate else None)

    def _write_rows(self) -> None:
        rows = self._log.rows
        if self._worker.rank == 0 and rows:
            self._checkpoints.check_owner()
            self._job.store.append("steps", rows, writer=self._job.writer, sequence=rows[0]["step"])
        rows.clear()

    def _save(self, step: int) -> None:
        """Rows once the checkpoint that they follow is whole, and before their own: whenever this is cut off, the
        only rows beyond the newest checkpoint are those right after it, which `_resume` drops."""
        self._checkpoints.finish()
        self._write_rows()
        self._checkpoints.save(step, self._student, self._optimizer)

    def _finish(self) -> None:
        weights = whole_weights(self._student)
        self._checkpoints.finish()
        if self._worker.rank == 0:
            self._checkpoints.check_owner()
            write_student(self._job, weights)
        self._checkpoints.wait()
        self._checkpoints.close()


def write_student(job: DistillJob, weights: dict[str, torch.Tensor]) -> None:
    """The distilled float32 student as a model folder, under its final name only when whole."""
    setting = job.setting
    arch = job.candidate.architecture(setting.architecture)
    names = setting.family.shapes(arch)
    own = ((name.removeprefix("model."), tensor) for name, tensor in weights.items())
    tensors = (
        (name, tensor.contiguous()) for name, tensor in unstacked(own, setting.family) if name in names
    )
    partial, final = job.folder / "final.partial", job.folder / "final"
    shutil.rmtree(partial, ignore_errors=True)  # of a group that was lost in the middle of it
    write_checkpoint(partial, tensors, setting.student_config(job.candidate, job.scores), dtype=torch.float32)
    partial.rename(final)
