"""A run from beginning to end: the stages in order, each skipped where its result is already there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from minitron_ray.core.errors import Interrupted
from minitron_ray.core.fingerprint import digest
from minitron_ray.experiment import Experiment
from minitron_ray.plan import (
    Plan,
    check_same_model,
    distilled_tokens,
    given_config,
    make_plan,
    stage_fingerprint,
)
from minitron_ray.stages import distill, evaluate, export, importance, search, teacher
from minitron_ray.stages.context import Context
from minitron_ray.stages.prepare import Prepared


def execute(context: Context, plan: Plan) -> None:
    """Runs what is missing. The run's status ends as succeeded, failed or interrupted.

    Raises what a stage raised; Interrupted when the user asked to stop.
    """
    run, ready, started = context.run, context.ready, time.monotonic()
    context.events.emit("run_started", experiment=run.experiment, run_id=run.run_id, folder=str(run.folder))
    run.set_status("running", teacher_digest=ready.teacher_digest, data_digest=ready.data_digest)
    status = "failed"
    try:
        run.finish_stage("prepare", digest(ready.output), ready.output, ready.summary, ready.seconds)
        _stages(context, plan, stage_fingerprints(plan, ready))
        status = "succeeded"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        run.set_status(status)
        context.events.emit("run_finished", status=status, seconds=time.monotonic() - started)


def _stages(context: Context, plan: Plan, marks: dict[str, str]) -> None:
    experiment, ready = context.experiment, context.ready
    setting = ready.setting
    context.stage(
        "importance",
        marks["importance"],
        lambda: importance.run(context, setting),
        total=experiment.data.calibration,
        unit="sequences",
    )
    signal = context.stage(
        "teacher",
        marks["teacher"],
        lambda: teacher.run(context, setting, ready.teacher_digest, ready.data_digest),
        unit="sequences",
    )
    found = context.stage(
        "search",
        marks["search"],
        lambda: search.run(context, plan, setting, signal["folder"]),
        total=plan.trials,
        unit="trials",
    )
    trained = context.stage(
        "distill",
        marks["distill"],
        lambda: distill.run(context, plan, setting, found["chosen"]),
        total=distilled_tokens(experiment),
        unit="tokens",
    )
    context.stage(
        "evaluate",
        marks["evaluate"],
        lambda: evaluate.run(context, setting, trained["folders"], signal["folder"]),
        total=experiment.data.validation * (1 + len(trained["folders"])),
        unit="sequences",
    )
    context.stage("export", marks["export"], lambda: export.run(context, plan, setting, trained["folders"]))


def plan_for(experiment: Experiment, base: Path, ready: Prepared) -> Plan:
    """The plan for the teacher that was found. Raises ConfigError where the experiment describes another."""
    given = given_config(experiment, base)
    if given is not None:
        check_same_model(given, ready.config)
    return make_plan(experiment, ready.config)


def run_fingerprint(plan: Plan, ready: Prepared) -> str:
    """Digest of the experiment, of what it names, and of the stages' versions: another text is another run."""
    return digest({"experiment": plan.fingerprint, "stages": stage_fingerprints(plan, ready)})


def stage_fingerprints(plan: Plan, ready: Prepared) -> dict[str, str]:
    """Each stage's fields, version, needs and inputs. Never paths, cluster, or numbers of workers."""
    e = plan.experiment
    inputs = {
        "teacher": ready.teacher_digest,
        "data": ready.data_digest,
        "seed": e.seed,
        "precision": e.precision,
    }
    splits = [e.data.calibration, e.data.validation]
    marks: dict[str, str] = {}

    def mark(stage: str, version: int, fields: Any, *needs: str) -> None:
        marks[stage] = stage_fingerprint(stage, version, fields, [marks[n] for n in needs], **inputs)

    mark("importance", importance.VERSION, {"splits": splits, "importance": e.importance})
    retrain = e.search.retrain
    mark("teacher", teacher.VERSION, {"splits": splits, "tokens": retrain.tokens, "batch": retrain.batch})
    space = [row.candidate.id for row in plan.feasible]
    mark("search", search.VERSION, {"search": e.search, "feasible": space}, "importance", "teacher")
    mark("distill", distill.VERSION, e.distill, "search")
    mark("evaluate", evaluate.VERSION, {}, "distill")
    mark("export", export.VERSION, e.export, "evaluate")
    return marks
