"""Iterative width importance: score the teacher, cut it a little, score what is left (paper §1.6)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from minitron_ray.importance.metric import UnitMetric
from minitron_ray.importance.rounds import joined, schedule
from minitron_ray.importance.units import UnitScores
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family
from minitron_ray.models.kept import Kept
from minitron_ray.search.selection import select
from minitron_ray.search.shape import Candidate, Refusals, shape_of
from minitron_ray.stages.scoring import Scorer
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.surgery import cut_tensors
from minitron_ray.weights.writing import write_checkpoint

WIDTHS: Final = ("hidden", "heads", "kv_heads", "mlp", "experts", "expert_mlp")

_TIED: Final = (("mlp",), ("experts",), ("expert_mlp",), ("kv_heads", "heads"), ("heads", "hidden"))
"""Axes that are fixed together, since one may have to be a multiple of the other."""


def round_shapes(
    family: Family, teacher: Architecture, students: Sequence[Candidate], rounds: int
) -> list[Candidate]:
    """The shapes that are scored after the first round: on each axis the schedule's size on the way to the
    smallest of `students`, or the next larger that can be cut and built.

    All layers stay. Where no such shape is smaller than the one before, a round scores that one again.
    """
    steps = {
        axis: schedule(getattr(teacher, axis), min(getattr(s, axis) for s in students), rounds)
        for axis in WIDTHS
    }
    found = [shape_of(teacher, {})]
    refusals = Refusals(family, teacher)
    for number in range(rounds - 1):
        wanted = {axis: sizes[number] for axis, sizes in steps.items()}
        found.append(_nearest(teacher, refusals, wanted, found[-1]))
    return found[1:]


def _nearest(
    teacher: Architecture, refusals: Refusals, wanted: dict[str, int], before: Candidate
) -> Candidate:
    """The shape between `wanted` and `before` that is smallest on one axis after the other."""
    sizes = {axis: getattr(before, axis) for axis in WIDTHS}
    if teacher.heads_per_group == 1:
        del sizes["kv_heads"]  # they follow the heads
    for together in _TIED:
        axes = [axis for axis in together if axis in sizes]
        between = [range(wanted[axis], getattr(before, axis) + 1) for axis in axes]
        for found in itertools.product(*between):
            tried = sizes | dict(zip(axes, found, strict=True))
            if refusals.of(shape_of(teacher, tried)) is None:
                sizes = tried
                break
    return shape_of(teacher, sizes)


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
            smaller = replace(scorer.work, setting=replace(setting, teacher_folder=Path(name)))
            scores, _ = replace(scorer, work=smaller).units(metric, None)
        rounds.append((kept, scores[metric.label]))
    return joined(rounds, teacher)


def write_round(setting: Setting, kept: Kept, folder: Path, report: Callable[..., None]) -> None:
    """In a worker: what is left of the teacher, as a checkpoint."""
    checkpoint, family, teacher = setting.checkpoint, setting.family, setting.architecture
    config = family.student_config(checkpoint.config, kept.architecture(teacher), kept)
    dtype = checkpoint.dtype(f"{family.embedding}.weight")
    write_checkpoint(folder, cut_tensors(checkpoint, family, teacher, kept), config, dtype=dtype)
