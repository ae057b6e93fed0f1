"""What each worker of a distillation does: shard the student, train it, save it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import AdamW

from minitron_ray.distillation.checkpoints import Checkpoints, whole_weights
from minitron_ray.distillation.loop import Recipe, Share, Step, make_optimizer, train
from minitron_ray.distillation.teacher import OnlineTeacher
from minitron_ray.execution.train_group import Worker
from minitron_ray.experiment import Distill
from minitron_ray.importance.scores import Scores
from minitron_ray.plan import distilled_tokens, steps
from minitron_ray.results.store import Store
from minitron_ray.search.space import Candidate
from minitron_ray.stages.setting import Setting
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

    @property
    def distill(self) -> Distill:
        distill = self.setting.experiment.distill
        assert distill is not None
        return distill

    @property
    def recipe(self) -> Recipe:
        distill = self.distill
        return self.setting.recipe(distill, distill.tokens, distill.loss)

    def every(self, tokens: int | None, parts: int) -> int:
        """Optimizer steps between two events: so many tokens, or `parts` times in all."""
        distill, length = self.distill, self.setting.experiment.data.sequence_length
        return max(1, steps(tokens, distill.batch, length) if tokens else self.recipe.steps // parts)


def distill_worker(job: DistillJob, worker: Worker) -> dict[str, Any]:
    """Runs on every rank; returns `step`, `tokens` and whether the user stopped it before the end."""
    written = (job.folder / "final").exists()  # another rank was lost after that
    step = job.recipe.steps if written else _Distillation(job, worker).run()
    batch_tokens = job.recipe.batch * job.recipe.sequence_length
    return {"step": step, "tokens": step * batch_tokens, "interrupted": step < job.recipe.steps}


class _Distillation:
    """Training, with the bookkeeping around each step."""

    def __init__(self, job: DistillJob, worker: Worker) -> None:
        setting = job.setting
        self._job, self._worker = job, worker
        torch.manual_seed(setting.experiment.seed)
        self._share: Share = setting.share(worker.rank, worker.world, worker.device)
        self._student: Headless = setting.sharded_student(
            job.candidate, job.scores, worker.world, worker.device
        )
        self._optimizer: AdamW = make_optimizer(self._student, job.recipe)
        distill = job.distill
        self._teacher: OnlineTeacher | None = None
        if distill.loss.needs_teacher:
            self._teacher = setting.online_teacher(self._share)
        self._checkpoints = Checkpoints(job.folder / "checkpoints", worker.rank)
        self._checkpoint_every = job.every(distill.checkpoint_every, 10)
        self._validate_every = job.every(distill.validate_every, 4)
        self._rows: list[dict[str, Any]] = []

    def run(self) -> int:
        """Trains from the newest checkpoint to the end; returns the last step made."""
        job, last = self._job, self._job.recipe.steps
        first = self._checkpoints.latest()
        if first:
            self._checkpoints.load(first, self._student, self._optimizer)
        data = job.setting.training_data(job.recipe.batch)
        for step in train(
            self._student,
            self._optimizer,
            self._teacher,
            data,
            job.recipe,
            self._share,
            first_step=first + 1,
            stop_requested=self._worker.stop_requested,
        ):
            self._record(step, validate=step.step % self._validate_every == 0 or step.step == last)
            if step.step % self._checkpoint_every == 0 or step.stop_requested or step.step == last:
                self._save(step.step)
            if step.stop_requested and step.step < last:
                return step.step
        self._finish()
        return last

    def _record(self, step: Step, validate: bool) -> None:
        val_loss = self._job.setting.measure(self._student, self._share).loss if validate else None
        self._rows.append(
            {
                "candidate_id": self._job.candidate.id,
                "step": step.step,
                "tokens": step.tokens,
                "loss": step.loss,
                "gradient_norm": step.gradient_norm,
                "learning_rate": step.learning_rate,
                "val_loss": val_loss,
                "tokens_per_second": step.tokens_per_second,
                "workers": self._worker.world,
            }
        )
        self._worker.report(
            "stage_progress",
            stage="distill",
            done=step.tokens,
            total=distilled_tokens(self._job.setting.experiment),
            unit="tokens",
            loss=step.loss,
            step=step.step,
            tokens_per_second=step.tokens_per_second,
            **({} if val_loss is None else {"val_loss": val_loss}),
        )

    def _save(self, step: int) -> None:
        """Rows first: killed between the two, the same steps are made and written again, under the same name."""
        if self._worker.rank == 0 and self._rows:
            writer = f"distill-{self._job.candidate.id}"
            self._job.store.append("steps", self._rows, writer=writer, sequence=self._rows[0]["step"])
        self._rows = []
        self._checkpoints.save(step, self._student, self._optimizer)

    def _finish(self) -> None:
        weights = whole_weights(self._student)
        if self._worker.rank == 0:
            write_student(self._job, weights)
        dist.barrier()


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
    write_checkpoint(partial, tensors, setting.student_config(job.candidate, job.scores), dtype=torch.float32)
    partial.rename(final)
