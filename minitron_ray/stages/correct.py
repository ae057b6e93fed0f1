"""Stage `correct`: fine-tune the teacher on the distillation text before it is scored, cut or learnt from.

The same loop as a distillation, by the same group of workers with the same checkpoints: the student is the
uncut teacher, and the loss, cross entropy, needs no teacher. What comes of it is an entry of the cache,
named by teacher, text and recipe: another experiment that asks for the same takes it. Until it is whole,
its checkpoints lie beside it, so that whoever is next goes on from them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from minitron_ray.core.errors import Interrupted
from minitron_ray.core.units import format_count
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.evaluation.measure import Measurement
from minitron_ray.execution.cluster import Cluster, in_group
from minitron_ray.experiment import Distill, Experiment, Export
from minitron_ray.importance.scores import Scores
from minitron_ray.models.architecture import Architecture
from minitron_ray.plan import corrected, correction_fingerprint
from minitron_ray.results.cache import Cache
from minitron_ray.results.files import link_or_copy
from minitron_ray.results.store import Store
from minitron_ray.search.shape import shape_of
from minitron_ray.stages.context import Context
from minitron_ray.stages.distill import train_student
from minitron_ray.stages.distill_job import DistillJob
from minitron_ray.stages.evaluate import figures
from minitron_ray.stages.prepare import Prepared
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.companions import copy_companions

if TYPE_CHECKING:
    from minitron_ray.execution.train_group import Worker

KIND: Final = "corrected_teachers"
"""Of the cache's entries: model folders, with their tokenizer and the tables of their training."""
WRITER: Final = "correct-teacher"
"""Of the rows of a run."""
UNCORRECTED: Final = "uncorrected"
"""Phase of the teacher's measurement before it is corrected."""


def run(context: Context) -> tuple[dict[str, Any], str]:
    """Writes `steps` and `evaluations` of the teacher; returns the folder of the corrected one.

    Raises Interrupted if the user asked to stop.
    """
    cache = Cache(context.cache.folder.parent.resolve())  # workers start in other folders
    experiment = context.experiment
    key = correction_fingerprint(experiment, context.ready.inputs)
    correction = experiment.teacher.correction
    assert correction is not None
    made, work = False, cache.folder / KIND / f"{key}.work"

    def fill(folder: Path) -> None:
        nonlocal made
        made = True
        _correct(context, work, folder)

    describe = {"what": f"{experiment.teacher.path}, corrected", "recipe": correction.recipe}
    try:
        folder = cache.ensure(KIND, key, describe, fill, _patience(context))
    finally:  # of an attempt that was stopped too; who made the entry may be removing what it was made from
        _copy_rows(cache.find(KIND, key) or work, context.run.store)
    shutil.rmtree(work, ignore_errors=True)
    return {"folder": str(folder), "recipe": key}, _summary(context.run.store, made)


def _patience(context: Context) -> Callable[[], None]:
    """While another run corrects the same teacher, which may take hours: says so once, and hears a stop."""
    told = False

    def wait() -> None:
        nonlocal told
        if context.cluster.stop.requested:
            raise Interrupted("stopped by request")
        if not told:
            context.cluster.events.emit(
                "note", text="waiting for another run, which corrects the same teacher"
            )
            told = True

    return wait


def taught_by(ready: Prepared, folder: Path) -> Prepared:
    """`ready` for all stages behind this one: the corrected teacher of `folder` in the teacher's place."""
    setting = ready.setting
    return replace(
        ready,
        setting=replace(setting, teacher_folder=folder),
        inputs=corrected(setting.experiment, ready.inputs),
    )


def training_of(experiment: Experiment) -> Experiment:
    """The correction as a distillation: of the teacher as it is, in its own model type, by cross entropy."""
    correction = experiment.teacher.correction
    assert correction is not None
    return experiment.model_copy(
        update={
            "teacher": experiment.teacher.model_copy(update={"correction": None}),
            "start": None,
            "search": None,
            "distill": Distill(**correction.model_dump(), loss=CrossEntropy(), intermediate=()),
            "export": Export(),
        }
    )


def _correct(context: Context, work: Path, folder: Path) -> None:
    """Trains in `work`, from where an earlier attempt ended, and leaves the model in `folder`."""
    setting: Setting = replace(
        context.ready.setting, experiment=training_of(context.experiment), start_folder=None
    )
    teacher = setting.architecture
    store = Store(work, context.run.experiment, context.run.run_id)
    if not store.has("evaluations", WRITER, 0):
        before = _measurement(context.cluster, setting)
        store.append(
            "evaluations", figures("teacher", UNCORRECTED, before, setting, 0), writer=WRITER, sequence=0
        )
    job = DistillJob(
        setting=setting,
        scores=_equal_scores(teacher),
        candidate=shape_of(teacher, {}),
        folder=work,
        store=store,
        checkpoints=context.cluster.settings.checkpoints,
        stage="correct",
    )
    train_student(context, job)
    for part in (work / "final").iterdir():
        link_or_copy(part, folder / part.name)
    copy_companions(setting.teacher_folder, folder)
    shutil.copytree(work / "tables", folder / "tables")


def _measurement(cluster: Cluster, setting: Setting) -> Measurement:
    """The teacher as it is, by one process, or by a group where there is one that shares it."""
    group = cluster.teacher_group()
    found: Measurement = (
        cluster.call(measure_teacher, setting)
        if group is None
        else cluster.map_groups(in_group, [setting], group, measure_teacher_in_group)[0]
    )
    return found


def measure_teacher(setting: Setting, report: Callable[..., None]) -> Measurement:
    """In a worker: the teacher as it is, on the validation sequences."""
    share = setting.share()
    return setting.measure(None, share, setting.online_teacher(share))


def measure_teacher_in_group(setting: Setting, worker: Worker) -> Measurement:
    """On every rank: the same, of a teacher that they share."""
    share = setting.share(worker.rank, worker.world, worker.device)
    return setting.measure(None, share, setting.online_teacher(share))


def _equal_scores(teacher: Architecture) -> Scores:
    """An axis that keeps its size is not ranked."""
    layers = teacher.layers
    return Scores(
        hidden=np.zeros(teacher.hidden), heads=np.zeros((layers, teacher.heads)), layers=np.zeros(layers)
    )


def _copy_rows(source: Path, store: Store) -> None:
    """The rows of the tables in `source` under the run's name, the model being called `teacher`."""
    there = Store(source, store.experiment, store.run_id)
    for table in ("steps", "evaluations"):
        found = list(there.fragments(table, "correct-"))
        if found:  # what an earlier attempt copied may have been cut into fragments elsewhere
            store.remove(table, WRITER)
        for _, sequence, rows in found:
            named = [row | {"candidate_id": "teacher"} for row in rows] if table == "steps" else rows
            store.append(table, named, writer=WRITER, sequence=sequence)


def _summary(store: Store, made: bool) -> str:
    steps = [row for row in store.read("steps").to_pylist() if row["candidate_id"] == "teacher"]
    steps.sort(key=lambda row: row["step"])
    tokens = steps[-1]["tokens"] if steps else 0
    before = [
        row["value"]
        for row in store.read("evaluations").to_pylist()
        if row["phase"] == UNCORRECTED and row["metric"] == "val_loss"
    ]
    after = [row["val_loss"] for row in steps if row["val_loss"] is not None]
    text = f"the teacher fine-tuned on {format_count(tokens)} tokens"
    if before and after:
        text += f": validation loss {before[0]:.3f} before, {after[-1]:.3f} now"
        if after[-1] >= before[0]:
            text += ", which is no gain: leave teacher.correction out, or lower its rate"
    return text if made else f"{text} (from the cache)"
