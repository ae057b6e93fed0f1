"""Stage `distill`: train the chosen students properly, each by a group of workers under Ray Train."""

from __future__ import annotations

import shutil
from typing import Any

from minitron_ray.core.errors import Interrupted
from minitron_ray.execution.train_group import run_group
from minitron_ray.plan import Plan
from minitron_ray.stages.context import Context
from minitron_ray.stages.distill_job import DistillJob, distill_worker
from minitron_ray.stages.importance import read_scores
from minitron_ray.stages.setting import Setting


def run(context: Context, plan: Plan, setting: Setting, chosen: list[str]) -> tuple[dict[str, Any], str]:
    """Writes `steps`; returns the folder of each distilled student, relative to the run's."""
    scores = read_scores(context)
    folders = {}
    for candidate_id in chosen:
        context.check_stop()
        folder = context.run.folder / "checkpoints" / candidate_id
        job = DistillJob(
            setting=setting,
            scores=scores,
            candidate=plan.candidate(candidate_id),
            folder=folder.resolve(),
            store=context.run.store,
            checkpoints=context.cluster.settings.checkpoints,
            rehearsal=context.run.rehearsal,
        )
        train_student(context, job)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        folders[candidate_id] = str((folder / "final").relative_to(context.run.folder))
    return {"folders": folders}, _summary(context, chosen)


def train_student(context: Context, job: DistillJob) -> None:
    """Until the job's `final/` is there, from its newest checkpoint. Raises Interrupted if the user asked to
    stop."""
    if (job.folder / "final").exists():  # killed behind it, and before the stage's end
        return
    shutil.rmtree(job.folder / "final.partial", ignore_errors=True)
    if run_group(context.cluster, distill_worker, job, job.saved)["interrupted"]:
        raise Interrupted("stopped by request")


def _summary(context: Context, chosen: list[str]) -> str:
    rows = [row for row in context.run.store.read("steps").to_pylist() if row["candidate_id"] == chosen[0]]
    last = max(rows, key=lambda row: row["step"])
    return (
        f"{len(chosen)} student{'s' if len(chosen) > 1 else ''}, {last['tokens']:,} tokens each by "
        f"{last['workers']} worker{'s' if last['workers'] > 1 else ''}; {chosen[0]}: loss {last['val_loss']:.3f}"
    )
