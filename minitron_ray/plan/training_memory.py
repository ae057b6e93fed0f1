"""Bytes of a student in training with what is beside it, and which students of a search train by themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Self

from minitron_ray.distillation.signals.online import Online
from minitron_ray.experiment import Correction, Distill, Experiment, Retrain
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family
from minitron_ray.plan.intermediate import resolve_intermediate
from minitron_ray.plan.memory import Layout, Memory
from minitron_ray.plan.signal import choose_signal

FITS: Final = 0.8
"""Of a device's memory: a trial that takes more of it is shared. The rest is for what arithmetic does not see, such
as the device's own libraries and memory in pieces that are too small."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Of one process."""

    experiment: Experiment
    memory: Memory
    teacher: Architecture
    online: bool
    """Whether the teacher runs beside a trial."""
    _known_pairs: dict[tuple[str, int], int] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, experiment: Experiment, family: Family, teacher: Architecture, layout: Layout) -> Self:
        """For the signal that the experiment names, or that is chosen for it."""
        memory = Memory(
            family=family,
            length=experiment.data.sequence_length,
            precision=experiment.precision,
            layout=layout,
        )
        online = isinstance(choose_signal(experiment, teacher), Online)
        return cls(experiment=experiment, memory=memory, teacher=teacher, online=online)

    def trial(self, arch: Architecture) -> int:
        """Of the student's trial: in one process, or in a group where that does not fit."""
        group = None if self.alone(arch) else self.memory.layout.trial_workers
        return self._trial(arch, group)

    def alone(self, arch: Architecture) -> bool:
        """Whether one process trains the student. By as many as there are for a trial it is trained where a device's
        memory is not known, or is the machine's, which trials share."""
        layout = self.memory.layout
        if layout.trial_workers == 1:
            return True
        if layout.memory is None or not layout.accelerator:
            return False
        return self._trial(arch, None) <= FITS * layout.memory

    def _trial(self, arch: Architecture, group: int | None) -> int:
        size = self.student(self.experiment.searched.retrain, arch, group, self.online)
        return size if self.online else size + self.memory.head(self.teacher)

    def student(self, section: Retrain | Distill, arch: Architecture, group: int | None, online: bool) -> int:
        """Of a student that so many processes share, None for one by itself; `online`: and of a teacher that
        runs beside it."""
        teacher, pairs = self.teacher, self._pairs(section, arch.layers)
        size = self.memory.training(
            arch,
            group,
            self.passes(section, group or 1),
            lifted=teacher.hidden if pairs and arch.hidden != teacher.hidden else None,
            pairs=pairs,
            compared=teacher.hidden,
        )
        return size + (self.memory.teaching(teacher, group, arch) if online else 0)

    def _pairs(self, section: Retrain | Distill, layers: int) -> int:
        """Of hidden states that a student of so many layers is to match: found once, as shapes are many."""
        key = type(section).__name__, layers
        if key not in self._known_pairs:
            found = resolve_intermediate(section, self.memory.family, self.teacher.layers, layers)
            self._known_pairs[key] = 0 if found is None else len(found.pairs)
        return self._known_pairs[key]

    def passes(self, section: Retrain | Distill | Correction, workers: int) -> int:
        """Of a worker, in an optimizer step."""
        return math.ceil(math.ceil(section.batch / workers) / self.memory.layout.micro_batch)
