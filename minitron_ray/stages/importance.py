"""Stage `importance`: score every unit and every layer of the teacher."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitron_ray.core.errors import MinitronError
from minitron_ray.importance.metric import ListeningLayerMetric, RemovalMetric
from minitron_ray.importance.scores import Scores
from minitron_ray.importance.units import UnitScores
from minitron_ray.models.cost import forward_flops
from minitron_ray.plan.plan import Plan
from minitron_ray.search.rounds import round_shapes
from minitron_ray.stages.context import Context
from minitron_ray.stages.rounds import score_rounds
from minitron_ray.stages.scoring import Scorer, Work, worthwhile
from minitron_ray.stages.setting import Setting


def run(context: Context, plan: Plan, setting: Setting) -> tuple[dict[str, Any], str]:
    """Writes the table `importance`: every label of the width metric, and the depth metric's."""
    section, store = context.experiment.importance, context.run.store
    students = [row.candidate for row in plan.feasible]
    scorer = _scorer(context, setting)
    heard = section.depth if isinstance(section.depth, ListeningLayerMetric) else None
    units, layers = scorer.units(section.width, heard)
    if section.iterations > 1:
        shapes = round_shapes(setting.family, setting.architecture, students, section.iterations)
        ranking = score_rounds(scorer, section.width, units[section.width.label], shapes)
        units = {section.width_label: ranking}
    if isinstance(section.depth, RemovalMetric):
        layers = scorer.layers(section.depth, min(student.layers for student in students))
    rows = 0
    store.remove("importance", "importance")
    for number, (label, scored) in enumerate(units.items()):
        _check(label, scored)
        table = scored.with_layers(layers if number == 0 else {}).table(label, section.depth.label)
        store.append("importance", table, writer="importance", sequence=number)
        rows += len(table)
    context.tokens = sum(scorer.seen)
    chosen = units[section.width_label].with_layers(layers)
    return {"rows": rows}, f"{rows:,} scores; {_told(chosen)}"


def read_scores(context: Context) -> Scores:
    """The scores that this experiment ranks by, of those that `run` wrote."""
    section = context.experiment.importance
    table = context.run.store.read("importance")
    return Scores.from_table(table, section.width_label, section.depth.label)


def _scorer(context: Context, setting: Setting) -> Scorer:
    cluster = context.cluster
    workers = cluster.mappers()
    if not cluster.settled:
        workers = worthwhile(_operations(context, setting), workers)
    work = Work(
        setting=setting,
        mode=cluster.settings.importance,
        workers=workers,
        together=min(workers, cluster.together()),
        folder=(context.run.folder / "scratch").resolve(),
    )
    return Scorer(cluster=cluster, work=work, base=context.ready.base)


def _operations(context: Context, setting: Setting) -> int:
    """Of the passes over the calibration sequences: one, or as many as there are layers that may be left out."""
    passes = (
        setting.architecture.layers if isinstance(context.experiment.importance.depth, RemovalMetric) else 1
    )
    length = context.experiment.data.sequence_length
    tokens = len(setting.splits.calibration) * length
    return passes * tokens * forward_flops(setting.family, setting.architecture, length)


def _check(label: str, scores: UnitScores) -> None:
    for axis, values in scores.axes().items():
        if not np.isfinite(values).all():
            place = np.argwhere(~np.isfinite(values))[0].tolist()
            raise MinitronError(
                f"importance: the score of {axis} {place} by {label} is not finite; the activations are "
                f"too large for it: take `sequence: mean`, or check the teacher's weights"
            )


def _told(scores: Scores) -> str:
    if not np.isnan(scores.layers).all():
        return f"least important layer {int(np.argmin(scores.layers))}"
    length, values = min(scores.blocks.items())
    start = int(np.argmin(values))
    return f"least important block of {length}: layers {start} to {start + length - 1}"
