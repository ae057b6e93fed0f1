"""Iterative width importance: score the teacher, cut it a little, score what is left (paper §1.6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from minitron_ray.importance.metric import UnitMetric
from minitron_ray.importance.rounds import joined
from minitron_ray.importance.units import UnitScores
from minitron_ray.models.kept import Kept
from minitron_ray.search.selection import select
from minitron_ray.search.shape import Candidate
from minitron_ray.stages.scoring import Scorer
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.surgery import cut_tensors
from minitron_ray.weights.writing import write_checkpoint


def score_rounds(
    scorer: Scorer, metric: UnitMetric, first: UnitScores, shapes: Sequence[Candidate]
) -> UnitScores:
    """One ranking of the teacher's units out of the scores of the whole teacher, `first`, and of what is
    left of it at each of `shapes`."""
    setting, folder = scorer.work.setting, scorer.work.folder
    teacher = setting.architecture
    rounds = [(Kept.whole(teacher), first)]
    for shape in shapes:
        ranking = joined(rounds, teacher).with_layers({1: np.zeros(teacher.layers)})
        kept = select(ranking, shape, teacher)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="round-", dir=folder) as name:
            scorer.cluster.call(write_round, setting, kept, Path(name))
            smaller = replace(scorer.work, setting=replace(setting, start_folder=Path(name)))
            scores, _ = replace(scorer, work=smaller).units(metric, None)
        rounds.append((kept, scores[metric.label]))
    return joined(rounds, teacher)


def write_round(setting: Setting, kept: Kept, folder: Path, report: Callable[..., None]) -> None:
    """In a worker: what is left of the teacher, as a checkpoint."""
    checkpoint, family, teacher = setting.checkpoint, setting.family, setting.architecture
    config = family.student_config(checkpoint.config, kept.architecture(teacher), kept)
    dtype = checkpoint.dtype(f"{family.embedding}.weight")
    write_checkpoint(folder, cut_tensors(checkpoint, family, teacher, kept), config, dtype=dtype)
