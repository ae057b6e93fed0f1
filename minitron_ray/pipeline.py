"""A run from beginning to end: the stages in order, each skipped where its result is already there."""

from __future__ import annotations

import time
from pathlib import Path

from minitron_ray.core.errors import Interrupted
from minitron_ray.core.fingerprint import digest
from minitron_ray.experiment import Experiment
from minitron_ray.plan import Plan, check_same_model, distilled_tokens, make_plan, stage_fingerprints
from minitron_ray.stages import (
    baselines,
    choice,
    correct,
    distill,
    evaluate,
    export,
    importance,
    precision,
    search,
    teacher,
    zero_shot,
)
from minitron_ray.stages.context import Context
from minitron_ray.stages.hardware import cost_rows
from minitron_ray.stages.objectives import Cost
from minitron_ray.stages.prepare import Prepared
from minitron_ray.weights.fetch import given_config


def execute(context: Context, plan: Plan) -> None:
    """Runs what is missing. The run's status ends as succeeded, failed or interrupted.

    Raises what a stage raised; Interrupted when the user asked to stop.
    """
    run, ready, started = context.run, context.ready, time.monotonic()
    context.events.emit("run_started", experiment=run.experiment, run_id=run.run_id, folder=str(run.folder))
    run.set_status("running", teacher_digest=ready.inputs.teacher, data_digest=ready.inputs.data)
    status = "failed"
    try:
        _write_plan(context, plan)
        settled = precision.settle(context, plan)
        output = ready.output | {"precision": settled.experiment.precision}
        run.finish_stage("prepare", digest(output), output, ready.summary, ready.seconds)
        _stages(context, settled, stage_fingerprints(settled, ready.inputs))
        status = "succeeded"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        run.set_status(status)
        context.events.emit("run_finished", status=status, seconds=time.monotonic() - started)


def _write_plan(context: Context, plan: Plan) -> None:
    store = context.run.store
    store.append("candidates", [row.row() for row in plan.rows], writer="space", sequence=0)
    store.append("sources", list(context.ready.sources), writer="prepare", sequence=0)
    store.append("costs", cost_rows(context.cluster.settings, context.cache, plan), writer="plan", sequence=0)


def _stages(context: Context, plan: Plan, marks: dict[str, str]) -> None:
    """Of a plan whose precision is settled."""
    experiment, validation = context.experiment, context.experiment.data.validation
    if "correct" in plan.stages:
        _correct(context, marks)
    setting, inputs = context.ready.setting, context.ready.inputs
    teacher.check_room(teacher.library_of(context, setting, inputs))
    context.stage(
        "importance",
        marks["importance"],
        lambda: importance.run(context, plan, setting),
        total=experiment.data.calibration,
        unit="sequences",
    )
    signal = context.stage(
        "teacher",
        marks["teacher"],
        lambda: teacher.run(context, setting, inputs),
        unit="sequences",
    )["folder"]
    chosen = _chosen(context, plan, marks, signal)
    folders = _distilled(context, plan, marks, chosen)
    students = {name: plan.candidate(name) for name in chosen}
    measured = 1 + len(folders) + (len(students) if plan.fixed else 0)
    context.stage(
        "evaluate",
        marks["evaluate"],
        lambda: evaluate.run(context, setting, students, folders, signal),
        total=validation * measured,
        unit="sequences",
        students=chosen,
    )
    choice.conclude(plan, context.run.store)  # once more, with baselines and distilled students
    if "export" in plan.stages:
        context.stage(
            "export",
            marks["export"],
            lambda: export.run(context, plan, setting, chosen, folders),
            students=chosen,
        )


def _correct(context: Context, marks: dict[str, str]) -> None:
    """What follows has the corrected teacher for a teacher."""
    folder = context.stage(
        "correct",
        marks["correct"],
        lambda: correct.run(context),
        total=distilled_tokens(correct.training_of(context.experiment)),
        unit="tokens",
    )["folder"]
    context.ready = correct.taught_by(context.ready, Path(folder))


def _chosen(context: Context, plan: Plan, marks: dict[str, str], signal: str | None) -> list[str]:
    """The candidates that go on: the fixed shape, or the best of the search."""
    if plan.fixed is not None:
        return [plan.fixed.candidate.id]
    setting = context.ready.setting
    if "zero_shot" in plan.stages:
        context.stage(
            "zero_shot", marks["zero_shot"], lambda: zero_shot.run(context, plan, setting), unit="cuts"
        )
    found: list[str] = context.stage(
        "search",
        marks["search"],
        lambda: search.run(context, plan, setting, signal),
        total=plan.trials,
        unit="trials",
        again=lambda: choice.choose(plan, context.run.store, Cost(plan)),
    )["chosen"]
    choice.conclude(plan, context.run.store)
    if "baselines" in plan.stages:
        context.stage(
            "baselines",
            marks["baselines"],
            lambda: baselines.run(context, plan, setting, signal, found[0]),
            unit="tokens",
        )
        choice.conclude(plan, context.run.store)
    return found


def _distilled(context: Context, plan: Plan, marks: dict[str, str], chosen: list[str]) -> dict[str, str]:
    """The folders of the distilled students; none where nothing is distilled."""
    if context.experiment.distill is None:
        return {}
    setting = context.ready.setting
    folders: dict[str, str] = context.stage(
        "distill",
        marks["distill"],
        lambda: distill.run(context, plan, setting, chosen),
        total=distilled_tokens(context.experiment),
        unit="tokens",
        students=chosen,
    )["folders"]
    return folders


def plan_for(experiment: Experiment, base: Path, ready: Prepared) -> Plan:
    """The plan for the models that were found. Raises ConfigError where the experiment describes others.

    Beside `start.experiment` a config only says what was expected before the student was there.
    """
    given = given_config(experiment.teacher.config, base)
    if given is not None:
        check_same_model(given, ready.config)
    start = experiment.start
    if start is not None and start.path is not None and ready.start is not None:
        given = given_config(start.config, base, "start")
        if given is not None:
            check_same_model(given, ready.start.config, "start")
    return make_plan(experiment, ready.config, ready.start)
