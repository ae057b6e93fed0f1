"""Stage `evaluate`: teacher, cut and distilled students on the same tokens by the same code.

The teacher is not run again where its signal is stored. The cuts of a search were measured at rung 0
of their trials, a fixed shape's is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minitron_ray.distillation.loop import Share
from minitron_ray.distillation.teacher import TeacherSignal
from minitron_ray.evaluation.measure import Measurement
from minitron_ray.execution.cluster import Cluster, in_group
from minitron_ray.importance.scores import Scores
from minitron_ray.plan import distilled_tokens
from minitron_ray.search.space import Candidate
from minitron_ray.stages.choice import search_rows
from minitron_ray.stages.context import Context
from minitron_ray.stages.importance import read_scores
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.documents import predictions
from minitron_ray.weights.headless import Headless

if TYPE_CHECKING:
    from minitron_ray.execution.train_group import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A student to be measured: as cut by the scores, or distilled and in a folder."""

    name: str
    candidate: Candidate
    scores: Scores | None = None
    folder: Path | None = None

    @property
    def phase(self) -> str:
        return "cut" if self.folder is None else "distilled"

    def open(self, setting: Setting, share: Share) -> Headless:
        """Of several ranks all must call."""
        if self.folder is None:
            assert self.scores is not None
            return setting.measured(*setting.cut(self.candidate, self.scores, torch.float32), share)
        checkpoint = Checkpoint(self.folder)
        return setting.measured(checkpoint.config, checkpoint, share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """All students, and the folder of the teacher's stored signal, None where it runs. Picklable."""

    setting: Setting
    students: Sequence[Subject]
    signal: str | None


def run(
    context: Context,
    setting: Setting,
    students: dict[str, Candidate],
    folders: dict[str, str],
    signal: str | None,
) -> tuple[dict[str, Any], str]:
    """Writes `evaluations` and `sequence_losses`; returns the perplexities by subject and phase.

    `folders` has the distilled students of `students`, relative to the run's.
    """
    subjects = list(_subjects(context, students, folders))
    job = Subjects(setting=setting, students=subjects, signal=signal)
    found = _measurements(context.cluster, job)
    sequences = sum(len(measurement.losses) for measurement in found)
    context.tokens = sequences * context.experiment.data.sequence_length
    tokens = distilled_tokens(context.experiment)
    writer = _Writer(context, setting)
    writer.add("teacher", "teacher", found[0], 0)
    for subject, measurement in zip(subjects, found[1:], strict=True):
        writer.add(subject.name, subject.phase, measurement, tokens if subject.phase == "distilled" else 0)
    for name in students if context.experiment.search is not None else ():
        writer.add(name, "cut", _cut_measurement(context, name), 0, sequences=False)
    return writer.write()


def _subjects(context: Context, students: dict[str, Candidate], folders: dict[str, str]) -> Iterator[Subject]:
    for name, candidate in students.items():
        if context.experiment.search is None:
            yield Subject(name=name, candidate=candidate, scores=read_scores(context))
        if name in folders:
            folder = (context.run.folder / folders[name]).resolve()
            yield Subject(name=name, candidate=candidate, folder=folder)


def _measurements(cluster: Cluster, job: Subjects) -> list[Measurement]:
    """Of the teacher and of every student: by one process, or by a group where there is one that shares them."""
    group = cluster.teacher_group() or cluster.trial_group()
    found: list[Measurement] = (
        cluster.call(measure_all, job)
        if group is None
        else cluster.map_groups(in_group, [job], group, measure_in_group)[0]
    )
    return found


def measure_all(job: Subjects, report: Callable[..., None]) -> list[Measurement]:
    """In a worker: measure the teacher, then every student against it."""
    return _measured(job, job.setting.share(), report)


def measure_in_group(job: Subjects, worker: Worker) -> list[Measurement]:
    """On every rank: the same, of models that they share."""
    return _measured(job, job.setting.share(worker.rank, worker.world, worker.device), worker.report)


def _measured(job: Subjects, share: Share, report: Callable[..., None]) -> list[Measurement]:
    setting, signal, subjects = job.setting, job.signal, job.students
    sequences = len(setting.splits.validation)
    teacher: TeacherSignal = (
        setting.stored_teacher(Path(signal), share) if signal else setting.online_teacher(share)
    )

    def one(place: int, subject: Headless | None) -> Measurement:
        done, total = sequences * place, sequences * (1 + len(subjects))
        return setting.measure(
            subject,
            share,
            teacher,
            progress=lambda n: report(
                "stage_progress", stage="evaluate", done=done + n, total=total, unit="sequences"
            ),
        )

    return [one(0, None), *(one(place, s.open(setting, share)) for place, s in enumerate(subjects, start=1))]


class _Writer:
    """Gathers the rows of each subject and writes them in one piece."""

    def __init__(self, context: Context, setting: Setting) -> None:
        self._store, self._setting = context.run.store, setting
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._losses: dict[str, list[dict[str, Any]]] = {}
        self._told: list[str] = []
        self._perplexities: dict[str, dict[str, float]] = {}

    def add(self, subject: str, phase: str, found: Measurement, tokens: int, sequences: bool = True) -> None:
        """`tokens` are those of its distillation; without `sequences`, its losses are in the table already."""
        setting = self._setting
        self._rows.setdefault(subject, []).extend(figures(subject, phase, found, setting, tokens))
        self._perplexities.setdefault(subject, {})[phase] = found.perplexity
        if not sequences:
            return
        self._losses.setdefault(subject, []).extend(
            {"subject": subject, "phase": phase, "tokens": tokens, "sequence": sequence, "loss": float(loss)}
            for sequence, loss in zip(setting.splits.validation, found.losses, strict=True)
        )
        name = subject if phase == "teacher" else f"{subject} {phase}"
        self._told.append(f"{name} {found.perplexity:.2f}")

    def write(self) -> tuple[dict[str, Any], str]:
        """The stage's output and summary."""
        for subject, rows in self._rows.items():
            self._store.append("evaluations", rows, writer=f"evaluate-{subject}", sequence=0)
        for subject, rows in self._losses.items():
            self._store.append("sequence_losses", rows, writer=f"evaluate-{subject}", sequence=0)
        return {"perplexity": self._perplexities}, f"perplexity: {', '.join(self._told)}"


def _cut_measurement(context: Context, candidate_id: str) -> Measurement:
    """What the candidate's trial measured before it was distilled."""
    losses = [
        (row["sequence"], row["loss"])
        for row in context.run.store.read("sequence_losses").to_pylist()
        if row["subject"] == candidate_id and row["phase"] == "cut"
    ]
    divergence = next(
        row["val_divergence"]
        for row in search_rows(context.run.store)
        if row["candidate_id"] == candidate_id and row["rung"] == 0
    )
    return Measurement(
        losses=np.asarray([loss for _, loss in sorted(losses)]),
        divergences=np.asarray([divergence]),
    )


def figures(
    subject: str, phase: str, measurement: Measurement, setting: Setting, distill_tokens: int
) -> list[dict[str, Any]]:
    """Rows of `evaluations`, of a measurement on all validation sequences."""
    ids = torch.from_numpy(setting.tokens().sequences(setting.splits.validation))
    count = predictions(ids, setting.separator)
    values = [
        ("val_loss", measurement.loss, measurement.stderr),
        # The error of exp(x) to first order.
        ("perplexity", measurement.perplexity, measurement.perplexity * measurement.stderr),
    ]
    if measurement.divergence is not None:
        error = measurement.divergence_stderr
        values.append(("val_divergence", measurement.divergence, math.nan if error is None else error))
    return [
        {
            "subject": subject,
            "phase": phase,
            "metric": metric,
            "value": value,
            "stderr": None if math.isnan(error) else error,
            "sequences": len(measurement.losses),
            "tokens": count,
            "distill_tokens": distill_tokens,
        }
        for metric, value, error in values
    ]
