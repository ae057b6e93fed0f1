"""Stage `importance`: score every unit of the teacher on the calibration sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minitron_ray.importance.capture import measure_importance
from minitron_ray.importance.scores import Scores
from minitron_ray.stages.context import Context
from minitron_ray.stages.setting import Setting

VERSION = 1


def run(context: Context, setting: Setting) -> tuple[dict[str, Any], str]:
    """Writes the table `importance`."""
    scores = context.cluster.call(score_units, setting)
    section = context.experiment.importance
    rows = list(scores.rows(section.width.label, section.depth.label))
    context.run.store.append("importance", rows, writer="importance", sequence=0)
    least = int(np.argmin(scores.layers))
    summary = f"{len(rows):,} units scored; least important layer {least}"
    return {"rows": len(rows)}, summary


def read_scores(context: Context) -> Scores:
    """The scores that `run` wrote."""
    return Scores.from_table(context.run.store.read("importance"))


def score_units(setting: Setting, report: Callable[..., None]) -> Scores:
    """In a worker: one pass over the calibration sequences."""
    share = setting.share()
    section, indices = setting.experiment.importance, np.asarray(setting.splits.calibration)
    tokens, size = setting.tokens(), setting.micro_batch
    batches = (tokens.sequences(indices[i : i + size]) for i in range(0, len(indices), size))

    def progress(done: int) -> None:
        report("stage_progress", stage="importance", done=done, total=len(indices), unit="sequences")

    return measure_importance(
        setting.teacher(share),
        setting.family,
        setting.architecture,
        batches,
        section.width,
        section.depth,
        progress,
    )
