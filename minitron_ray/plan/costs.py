"""What each stage takes, before it is run: tokens, floating-point operations, memory, disk, device time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from minitron_ray.core.hardware import Hardware
from minitron_ray.core.units import format_bytes, format_count
from minitron_ray.experiment import Correction, Distill, Experiment, Retrain
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.cost import forward_flops, head_flops, training_flops, weight_bytes
from minitron_ray.models.family import Family
from minitron_ray.plan.checkpoints import most_checkpoints
from minitron_ray.plan.memory import CHECKPOINT_BYTES, Layout, Memory
from minitron_ray.plan.rungs import first_halving, steps_text
from minitron_ray.plan.scoring import scoring_passes
from minitron_ray.plan.signal import SignalCost, signal_costs, signal_tokens
from minitron_ray.plan.students import costliest_first
from minitron_ray.plan.tokens import (
    cohorts_at_rungs,
    kept_students,
    rung_tokens,
    tokens_seen,
    trials_at_rungs,
    validations_of,
)
from minitron_ray.plan.training_memory import TrainingMemory
from minitron_ray.search.baselines import LARGEST, affordable
from minitron_ray.search.space import CandidateRow

DISTILL_CHECKPOINTS = 3
"""Of a distillation on disk at a time: two that are kept, and the one that is being written."""
TRIAL_CHECKPOINTS, GROUP_CHECKPOINTS = 1, 2
"""That are kept of a trial in one process, and of one that a group trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """An upper bound: of several shapes it takes the costliest. What ties may add comes on top."""

    stage: str
    what: str
    tokens: int
    """That go through a network, once for each network and pass."""
    flops: float
    tie_tokens: int = 0
    """More of them, at most, where trials tie and are therefore trained on and kept."""
    memory_bytes: int | None = None
    """Of one process, on its device."""
    disk_bytes: int = 0
    """Of the files that it writes, tables aside, where there are most of them."""
    device_seconds: float | None = None
    """Of one device; None where no hardware is known."""

    def row(self) -> dict[str, object]:
        """A row of the table `costs`."""
        return {name: getattr(self, name) for name in self.__slots__}


def costs(
    experiment: Experiment,
    family: Family,
    teacher: Architecture,
    feasible: Sequence[CandidateRow],
    stages: Sequence[str],
    start: Architecture | None = None,
    layout: Layout | None = None,
    signal_of: str | None = None,
    corrected_by: str | None = None,
) -> tuple[StageCost, ...]:
    """What those of `stages` take that compute, in their order.

    `start` is the model that is cut, where it is not the teacher; `signal_of` names an experiment that has
    stored the teacher's signal by then, `corrected_by` one that has corrected it.
    """
    counted = _Costs(
        experiment=experiment,
        family=family,
        teacher=teacher,
        start=start or teacher,
        feasible=tuple(feasible),
        layout=layout or Layout(),
        signal_of=signal_of,
        corrected_by=corrected_by,
    )
    return tuple(cost for stage in stages if (cost := counted.of(stage)) is not None)


def timed(found: Sequence[StageCost], hardware: Hardware | None) -> tuple[StageCost, ...]:
    """The same with the time that they take on `hardware`."""
    if hardware is None:
        return tuple(found)
    return tuple(replace(cost, device_seconds=hardware.device_seconds(cost.flops)) for cost in found)


@dataclass(frozen=True, kw_only=True)
class _Costs:
    experiment: Experiment
    family: Family
    teacher: Architecture
    start: Architecture
    feasible: tuple[CandidateRow, ...]
    layout: Layout
    signal_of: str | None
    corrected_by: str | None

    def of(self, stage: str) -> StageCost | None:
        """None for a stage that computes nothing to speak of."""
        match stage:
            case "correct":
                return self._correct()
            case "importance":
                return self._importance()
            case "teacher":
                return self._signal_pass()
            case "zero_shot":
                return self._zero_shot()
            case "search":
                return self._search()
            case "baselines":
                return self._baselines()
            case "distill":
                return self._distill()
            case "evaluate":
                return self._evaluate()
            case "export":
                return self._export()
        return None

    # --- Stages --------------------------------------------------------------------------------------

    def _correct(self) -> StageCost | None:
        correction = self.experiment.teacher.correction
        if correction is None:
            return None
        what = f"the teacher fine-tuned on {format_count(correction.tokens)} tokens"
        if self.corrected_by is not None:
            what = f"{what}, which {self.corrected_by} has done by then"
            return StageCost(stage="correct", what=what, tokens=0, flops=0.0)
        tokens, parameters = self._seen(correction), self.family.parameters(self.teacher)
        measured = 1 + validations_of(correction, self.length)
        trained = tokens * training_flops(self.family, self.teacher, self.length)
        workers, passes = self.layout.workers, self.training.passes(correction, self.layout.workers)
        return StageCost(
            stage="correct",
            what=f"{what}, kept in the cache",
            tokens=tokens,
            flops=float(trained + measured * self.validation * self._forward(self.teacher)),
            memory_bytes=max(
                self.memory.training(self.teacher, workers, passes)
                + self.memory.checkpoint(self.teacher, workers),
                self._teacher_bytes,
            ),
            disk_bytes=parameters * (DISTILL_CHECKPOINTS * CHECKPOINT_BYTES + 4),
        )

    def _importance(self) -> StageCost:
        shapes = [row.candidate for row in self.feasible]
        passes = list(scoring_passes(self.experiment, self.family, self.start, shapes))
        outputs = max((one.outputs for one in passes), default=1)
        return StageCost(
            stage="importance",
            what=" and ".join(one.what for one in passes) or "scores that need no pass",
            tokens=sum(one.tokens for one in passes),
            flops=sum(one.flops for one in passes),
            memory_bytes=self.memory.scoring(self.start, outputs),
        )

    def _signal_pass(self) -> StageCost:
        if self.online:
            return StageCost(
                stage="teacher", what="online where it is needed: nothing is stored", tokens=0, flops=0.0
            )
        searched = self.experiment.search is not None and signal_tokens(self.experiment) > 0
        of = "search and validation" if searched else "validation"
        trained = self._seen(self.experiment.searched.retrain) if searched else 0
        if self.signal_of is not None:
            what = f"{self.signal.signal.label} of {of}, which {self.signal_of} has stored by then"
            return StageCost(stage="teacher", what=what, tokens=0, flops=0.0)
        return StageCost(
            stage="teacher",
            what=f"{self.signal.signal.label} of {of}, {format_bytes(self.signal.bytes)}, kept in the cache",
            tokens=trained + self.validation,
            flops=self.signal.once,
            memory_bytes=self._teacher_bytes,
            disk_bytes=self.signal.bytes,
        )

    def _zero_shot(self) -> StageCost | None:
        zero_shot = self.experiment.searched.zero_shot
        if zero_shot is None:
            return None
        shapes = min(zero_shot.shapes, len(self.feasible))
        tokens = min(zero_shot.sequences, self.experiment.data.validation) * self.length
        return StageCost(
            stage="zero_shot",
            what=f"{shapes} undistilled cuts on {tokens // self.length} validation sequences",
            tokens=shapes * tokens,
            flops=float(tokens * sum(self._forward(arch) for arch in self.students[:shapes])),
            memory_bytes=self.memory.scored_cut(self.largest, self.layout.trial_workers),
        )

    def _search(self) -> StageCost:
        retrain, trials = self.experiment.searched.retrain, self.trials
        tokens, trained = 0, 0.0
        measured = sum(self._measured(arch) for arch in self.students[:trials])
        for reached, start, end in self._segments():
            tokens += reached * (end - start)
            students, last = self.students[:reached], end == self.rungs[-1]
            trained += sum((end - start) * self._trained(arch, retrain) for arch in students)
            measured += sum(self._measured(arch, compared=last) for arch in students)
        what = f"{trials} trials of {format_count(self.rungs[-1])} tokens"
        if self.experiment.searched.halving is not None:
            what += f", of which {self.reached[-1]} go to the end"
        if (first := first_halving(self.experiment)) is not None:
            what += f", the first halving after {steps_text(first)}"
        what += self._shared()
        what += f"; {measured / (trained + measured):.0%} of this is measuring them"
        ties = trials * self.rungs[-1] - tokens if self.ties else 0
        return StageCost(
            stage="search",
            what=what + _more(ties),
            tokens=tokens,
            tie_tokens=ties,
            flops=trained + measured,
            memory_bytes=self._trial_bytes,
            disk_bytes=CHECKPOINT_BYTES * self.family.parameters(self.largest) * self._checkpoints(),
        )

    def _shared(self) -> str:
        """How many processes a trial has, where that is not one for all."""
        group, shapes = self.layout.trial_workers, len(self.students)
        if not self._mixed:
            return "" if group == 1 else f", {group} processes each"
        rest = f", {group} each for the others" if self._alone < shapes else ""
        return f", one process each for {self._alone} of {shapes} shapes{rest}"

    @property
    def _mixed(self) -> bool:
        """Whether trials may be groups, but not all of them are."""
        return self.layout.trial_workers > 1 and self._alone > 0

    @cached_property
    def _alone(self) -> int:
        """How many shapes one process trains."""
        return sum(map(self.training.alone, self.students))

    def _checkpoints(self) -> int:
        """Of trials: of those in training, and of those that wait at a rung. Where nothing is halved none waits."""
        search = self.experiment.searched
        cohorts: Sequence[Sequence[int]] = cohorts_at_rungs(self.experiment, self.trials, len(self.feasible))
        if search.halving is None:
            cohorts = [counts[-1:] for counts in cohorts]
        return most_checkpoints(
            cohorts,
            self._kept_checkpoints,
            keep_stopped=search.keep == "ties",
            at_once=None if self._mixed else self.layout.trials_at_once,
        )

    @property
    def _kept_checkpoints(self) -> int:
        """Of one trial."""
        return GROUP_CHECKPOINTS if self.layout.trial_workers > 1 else TRIAL_CHECKPOINTS

    def _baselines(self) -> StageCost:
        """At most: what the search has trained to the end is not trained again."""
        search, each, spent = self.experiment.searched, self.rungs[-1], self._search()
        lot = affordable(spent.tokens, each, len(self.feasible))
        most = affordable(spent.tokens + spent.tie_tokens, each, len(self.feasible))
        ties = (most - lot) * each if "random" in search.baselines else 0
        scored = min(LARGEST, len(self.feasible)) if "largest_first" in search.baselines else 0
        count = sum(lot if name == "random" else 1 for name in search.baselines)
        students = [self.students[place % len(self.students)] for place in range(count)]
        flops = sum(
            each * self._trained(arch, search.retrain)
            + 2 * self._measured(arch)
            + (len(self.rungs) - 1) * self._measured(arch, compared=False)
            for arch in students
        )
        # Each goes from rung to rung by itself.
        states = most_checkpoints(
            [[count]], self._kept_checkpoints, keep_stopped=False, at_once=self.layout.trials_at_once
        )
        named = [f"{lot} by lot" if name == "random" else name for name in search.baselines]
        return StageCost(
            stage="baselines",
            what=f"{', '.join(named)}: {_students(count)}, {format_count(each)} tokens each" + _more(ties),
            tokens=count * each,
            tie_tokens=ties,
            flops=flops + sum(self._measured(arch, compared=False) for arch in self.students[:scored]),
            memory_bytes=self._trial_bytes,
            disk_bytes=CHECKPOINT_BYTES * self.family.parameters(self.largest) * states,
        )

    def _distill(self) -> StageCost:
        distill = self.experiment.distill
        assert distill is not None
        tokens, kept = self._seen(distill), self.kept
        online = forward_flops(self.family, self.teacher, self.length) if distill.needs_teacher else 0
        validations = validations_of(distill, self.length)
        flops = sum(
            tokens * (training_flops(self.family, arch, self.length) + online)
            + validations * self.validation * (self._forward(arch) + online)
            for arch in self.students[:kept]
        )
        parameters, workers = self.family.parameters(self.largest), self.layout.workers
        return StageCost(
            stage="distill",
            what=f"{_students(kept)}{', teacher online' if online else ''}"
            + (f", spread over {self.layout.workers_text} workers" if self.layout.workers_text != "1" else "")
            + _more(self.tied * tokens),
            tokens=kept * tokens,
            tie_tokens=self.tied * tokens,
            flops=float(flops),
            memory_bytes=self._training_bytes(distill, workers, distill.needs_teacher)
            + max(self.memory.checkpoint(arch, workers) for arch in self.students),
            disk_bytes=parameters * (DISTILL_CHECKPOINTS * CHECKPOINT_BYTES + 4 * kept),
        )

    def _evaluate(self) -> StageCost:
        """Cuts were measured by their trials; the teacher's own measurement takes its signal."""
        searched, distilled = self.experiment.search is not None, self.experiment.distill is not None
        students = (0 if searched else 1) + (self.kept if distilled else 0)
        if searched:
            whom = f"teacher and {_students(students)}" if students else "teacher, from its signal"
        else:
            whom = "teacher, cut and distilled student" if distilled else "teacher and cut"
        own = self.validation * head_flops(self.teacher)
        if self.online:
            own = self.validation * (forward_flops(self.family, self.teacher, self.length))
        measured = self.students[: self.kept]
        rounds = int(not searched) + int(distilled)
        ties = self.validation * self.tied if distilled else 0
        return StageCost(
            stage="evaluate",
            what=f"{self.experiment.data.validation} validation sequences: {whom}" + _more(ties),
            tokens=self.validation * (1 + students),
            tie_tokens=ties,
            flops=float(own + rounds * sum(self._measured(arch) for arch in measured)),
            memory_bytes=self.memory.measuring(self.largest, self.layout.measuring_workers) + self._beside,
        )

    def _export(self) -> StageCost:
        dtype, kept = self.experiment.export.dtype, self.kept
        size = kept * weight_bytes(self.family, self.largest, dtype)
        return StageCost(
            stage="export",
            what=f"{_students(kept)} in {dtype}, {format_bytes(size)}",
            tokens=0,
            flops=0.0,
            disk_bytes=size,
        )

    # --- What they are made of --------------------------------------------------------------------

    def _forward(self, arch: Architecture) -> int:
        return forward_flops(self.family, arch, self.length)

    def _seen(self, section: Retrain | Distill | Correction) -> int:
        return tokens_seen(section.tokens, section.batch, self.length)

    def _trained(self, student: Architecture, retrain: Retrain) -> float:
        """Operations of a trained token in a trial."""
        beside = self.signal.each / retrain.tokens if retrain.needs_teacher else 0
        return training_flops(self.family, student, self.length) + beside

    def _measured(self, student: Architecture, *, compared: bool = True) -> float:
        """Operations of one measurement: the student, and where it is compared with the teacher that one's
        head or all of it."""
        beside = 0
        if compared:
            whole = forward_flops(self.family, self.teacher, self.length)
            beside = whole if self.online else head_flops(self.teacher)
        return float(self.validation * (self._forward(student) + beside))

    @cached_property
    def _trial_bytes(self) -> int:
        """Memory of one process of a trial, of the student that takes the most of it."""
        return max(self.training.trial(arch) for arch in self.students)

    def _training_bytes(self, section: Distill, group: int, online: bool) -> int:
        """The same of a distillation."""
        return max(self.training.student(section, arch, group, online) for arch in self.students)

    @property
    def _beside(self) -> int:
        """Bytes of the teacher where a student is measured: all of it or a shard, or its head."""
        if not self.online:
            return self.memory.head(self.teacher)
        return self.memory.running(self.teacher, self.layout.measuring_workers)

    @property
    def _teacher_bytes(self) -> int:
        """Of a teacher that runs by itself: all of it or a shard, and a chunk of logits."""
        return self.memory.running(self.teacher, self.layout.teacher_workers) + self.memory.logits

    @property
    def length(self) -> int:
        return self.experiment.data.sequence_length

    @property
    def validation(self) -> int:
        return self.experiment.data.validation * self.length

    @property
    def trials(self) -> int:
        return min(self.experiment.searched.trials, len(self.feasible))

    @property
    def kept(self) -> int:
        return kept_students(self.experiment)

    @property
    def ties(self) -> bool:
        """Whether trials that tie with the best are trained to the end, and kept."""
        return self.experiment.search is not None and self.experiment.search.keep == "ties"

    @property
    def tied(self) -> int:
        """How many students more are kept where all trials tie."""
        return self.trials - self.kept if self.ties else 0

    @property
    def rungs(self) -> tuple[int, ...]:
        return rung_tokens(self.experiment)

    @property
    def reached(self) -> tuple[int, ...]:
        """How many trials train up to each rung."""
        return trials_at_rungs(self.experiment, self.trials, len(self.feasible))

    def _segments(self) -> list[tuple[int, int, int]]:
        """How many trials train between two rungs, and the tokens at the two."""
        return list(zip(self.reached, (0, *self.rungs), self.rungs, strict=False))

    @cached_property
    def students(self) -> tuple[Architecture, ...]:
        """Costliest first."""
        return costliest_first(self.family, self.start, self.feasible, self.length)

    @cached_property
    def largest(self) -> Architecture:
        """By parameters, which is what memory and disk go by."""
        row = max(self.feasible, key=lambda row: row.parameters)
        return row.candidate.architecture(self.start)

    @cached_property
    def signal(self) -> SignalCost:
        return next(c for c in signal_costs(self.experiment, self.family, self.teacher) if c.chosen)

    @cached_property
    def training(self) -> TrainingMemory:
        return TrainingMemory.of(self.experiment, self.family, self.teacher, self.layout)

    @property
    def memory(self) -> Memory:
        return self.training.memory

    @property
    def online(self) -> bool:
        return self.training.online


def _more(ties: int) -> str:
    return f"; up to {format_count(ties)} tokens more where trials tie" if ties else ""


def _students(count: int) -> str:
    return f"{count} student{'s' if count != 1 else ''}"
