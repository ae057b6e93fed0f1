"""Tokens and floating-point operations of each stage, before it is run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from minitron_ray.core.units import format_bytes, format_count
from minitron_ray.experiment import Experiment
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.cost import distillation_flops, forward_flops, training_flops
from minitron_ray.models.family import Family

LARGEST_SIGNAL: Final = 64 * 2**30
"""Bytes of stored teacher signal above which the teacher runs online wherever it is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """An upper bound: halving only ever does less."""

    stage: str
    what: str
    tokens: int
    flops: float


def costs(
    experiment: Experiment, family: Family, teacher: Architecture, students: list[Architecture]
) -> tuple[StageCost, ...]:
    """What each stage of the experiment takes, where all students are as costly as the costliest."""
    length = experiment.data.sequence_length
    largest = max(students, key=lambda student: forward_flops(family, student, length))
    return tuple(_Costs(experiment, family, teacher, largest, len(students)).stages())


@dataclass(frozen=True, slots=True)
class _Costs:
    experiment: Experiment
    family: Family
    teacher: Architecture
    student: Architecture
    shapes: int

    def stages(self) -> Iterator[StageCost]:
        data, search, distill = self.experiment.data, self.experiment.search, self.experiment.distill
        calibration = data.calibration * data.sequence_length
        yield StageCost(
            stage="importance",
            what=f"{data.calibration} calibration sequences, forward",
            tokens=calibration,
            flops=float(calibration * self._forward(self.teacher)),
        )
        yield self._signal()
        if search is not None:
            trials = min(search.trials, self.shapes)
            yield StageCost(
                stage="search",
                what=f"{trials} trials of {format_count(search.retrain.tokens)} tokens",
                tokens=trials * search.retrain.tokens,
                flops=float(trials * self._trial()),
            )
        if distill is not None:
            a_token = distillation_flops(self.family, self.teacher, self.student, data.sequence_length)
            yield StageCost(
                stage="distill",
                what=f"{_students(self._kept)}, teacher online",
                tokens=self._kept * distill.tokens,
                flops=float(self._kept * distill.tokens * a_token),
            )
        yield self._evaluation()

    def _signal(self) -> StageCost:
        tokens = self._signal_tokens
        size = format_bytes(tokens * signal_bytes_a_token(self.teacher))
        of = "search and validation" if self.experiment.search is not None else "validation"
        return StageCost(
            stage="teacher",
            what=f"online where it is needed: stored it would take {size}"
            if self._online
            else f"the teacher's signal on {of} tokens, {size} on disk",
            tokens=0 if self._online else tokens,
            flops=0.0 if self._online else float(tokens * self._forward(self.teacher)),
        )

    def _trial(self) -> int:
        """Operations of one trial."""
        data, retrain = self.experiment.data, self.experiment.searched.retrain
        trained = retrain.tokens * training_flops(self.family, self.student, data.sequence_length)
        measured = self._validation * (retrain.rungs + 1) * self._forward(self.student)
        return trained + measured + (self._signal_tokens * self._forward(self.teacher) if self._online else 0)

    def _evaluation(self) -> StageCost:
        """Cuts were measured by their trials; the teacher's signal is all that is needed of it."""
        data, distilled = self.experiment.data, self.experiment.distill is not None
        students = (1 if self.experiment.search is None else 0) + (self._kept if distilled else 0)
        whom = f"teacher and {_students(students)}" if students else "teacher, from its signal"
        if self.experiment.search is None:
            whom = "teacher, cut and distilled student" if distilled else "teacher and cut"
        flops = students * self._forward(self.student)
        flops += (1 + students) * self._forward(self.teacher) if self._online else 0
        return StageCost(
            stage="evaluate",
            what=f"{data.validation} validation sequences: {whom}",
            tokens=self._validation * (1 + students),
            flops=float(self._validation * flops),
        )

    @property
    def _kept(self) -> int:
        return self.experiment.search.keep if self.experiment.search is not None else 1

    @property
    def _validation(self) -> int:
        return self.experiment.data.validation * self.experiment.data.sequence_length

    @property
    def _signal_tokens(self) -> int:
        """Tokens whose teacher signal is wanted more than once."""
        search = self.experiment.search
        return self._validation + (search.retrain.tokens if search is not None else 0)

    @property
    def _online(self) -> bool:
        return self._signal_tokens * signal_bytes_a_token(self.teacher) > LARGEST_SIGNAL

    def _forward(self, arch: Architecture) -> int:
        return forward_flops(self.family, arch, self.experiment.data.sequence_length)


def _students(count: int) -> str:
    return f"{count} student{'s' if count != 1 else ''}"


def signal_bytes_a_token(teacher: Architecture) -> int:
    """Bytes of the teacher's final hidden states, at most (float32)."""
    return 4 * teacher.hidden


def steps(tokens: int, batch: int, sequence_length: int) -> int:
    """Optimizer steps that see at least `tokens`."""
    return math.ceil(tokens / (batch * sequence_length))


def tokens_seen(tokens: int, batch: int, sequence_length: int) -> int:
    """`tokens` rounded up to whole optimizer steps: what training really sees."""
    return steps(tokens, batch, sequence_length) * batch * sequence_length


def distilled_tokens(experiment: Experiment) -> int:
    """Tokens that each chosen student sees in its distillation; 0 where there is none."""
    distill = experiment.distill
    if distill is None:
        return 0
    return tokens_seen(distill.tokens, distill.batch, experiment.data.sequence_length)
