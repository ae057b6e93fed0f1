"""A trial whose student does not fit one device: a group of workers under Ray Train, from rung to rung.

Between two rungs nothing of the group is left but its checkpoint, so that a trial that waits for the
others of its cohort holds no device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitron_ray.distillation.loop import Step
from minitron_ray.execution.train_group import Worker
from minitron_ray.importance.scores import Scores
from minitron_ray.search.space import Candidate
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.trial import RungResult, progress_fields, retrain
from minitron_ray.stages.trial_state import ShardedState


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTrial:
    """One candidate's trial. Picklable."""

    setting: Setting
    scores: Scores
    candidate: Candidate
    signal: Path | None
    """Folder of the teacher's stored signal; None runs the teacher in each worker."""
    folder: Path
    """Holds the state that the next group goes on from; every node must see it."""


def to_next_rung(trial: GroupTrial, worker: Worker) -> list[RungResult]:
    """Runs on every rank: trains to the next rung, or until asked to stop; gives all rungs passed so far."""
    setting = trial.setting
    share = setting.share(worker.rank, worker.world, worker.device)
    student = setting.sharded_student(
        trial.candidate, trial.scores, share, setting.experiment.searched.retrain
    )
    teacher = setting.stored_teacher(trial.signal, share) if trial.signal else setting.online_teacher(share)

    def on_step(step: Step) -> None:
        worker.report("trial_progress", **progress_fields(setting, trial.candidate, step))

    return retrain(
        setting,
        student,
        teacher,
        share,
        on_rung=lambda rung: None,
        on_step=on_step,
        stop=worker.stop_requested,
        resume=ShardedState(trial.folder, worker.rank, worker.device),
        one_rung=True,
    )
