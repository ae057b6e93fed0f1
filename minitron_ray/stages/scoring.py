"""How the teacher is scored: which passes are made over which sequences, and what a worker does in one.

Whatever decides the scores is independent of how many workers there are: sequences are grouped, and
batches cut, before they are shared out, and results are put together in their order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from minitron_ray.evaluation.task import Examples, Material, Sequences
from minitron_ray.execution.cluster import Cluster
from minitron_ray.importance.capture import Group, gather, gather_streamed, grouped, merged
from minitron_ray.importance.evidence import Evidence, Listeners
from minitron_ray.importance.metric import (
    ListeningLayerMetric,
    ListeningUnitMetric,
    RemovalMetric,
    StaticUnitMetric,
    UnitMetric,
)
from minitron_ray.importance.removal import Removed, removal_values, score_layers
from minitron_ray.importance.units import UnitScores
from minitron_ray.plan.memory import WEIGHTS_SHARE
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.device import free_memory
from minitron_ray.weights.layerwise import Layerwise, StreamedLayerwise

STREAMS_SHARE: Final = 0.25
"""Of the free memory of the machine: what the hidden states of a streamed teacher may take, those of all workers
on it, before they go to files."""
_WORTH_A_PROCESS: Final = 2e11
"""Operations that a few processors do while one more process starts and loads its libraries."""
_HOST: Final = torch.device("cpu")

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every worker of a pass gets. Small, and picklable."""

    setting: Setting
    mode: Literal["auto", "resident", "streamed"]
    workers: int
    together: int
    """The most of them that may share one machine."""
    folder: Path
    """For files that do not outlive the pass."""

    def resident(self) -> bool:
        """Whether the weights of the model that is cut fit what this worker may take of the free memory."""
        if self.mode != "auto":
            return self.mode == "resident"
        setting, share = self.setting, self.setting.share()
        size = setting.family.parameters(setting.architecture) * share.dtype.itemsize
        device = share.device
        sharing = self.together if device.type == _HOST.type else 1
        return fits(size, free_memory(device), sharing, WEIGHTS_SHARE)

    def streams_folder(self, sequences: int, positions: int) -> Path | None:
        """Where the hidden states of so many sequences go; None for memory."""
        setting, share = self.setting, self.setting.share()
        tokens = sequences * setting.experiment.data.sequence_length
        size = tokens * positions * setting.architecture.hidden * share.dtype.itemsize
        # They leave the device after each layer: it is the machine's memory that they take.
        return None if fits(size, free_memory(_HOST), self.together, STREAMS_SHARE) else self.folder

    def layerwise(self) -> Layerwise:
        """The teacher, layer by layer, whole in memory or not."""
        setting, share = self.setting, self.setting.share()
        if self.resident():
            return Layerwise(setting.start(share).model, setting.family)
        return StreamedLayerwise(setting.checkpoint, dtype=share.dtype, device=share.device)


def fits(size: int, free: int, sharing: int, share: float) -> bool:
    """Whether each of `sharing` processes may take `size` bytes of a memory of which so many are `free` and all of
    them together may take `share`."""
    return sharing * size <= share * free


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """Runs passes on a cluster."""

    cluster: Cluster
    work: Work
    base: Path
    """The experiment file's folder, where the files of a task are looked for."""
    seen: list[int] = field(default_factory=list)
    """Tokens of every pass over the calibration sequences so far, and of a task's examples, which many sets
    of layers go through at a time."""

    def units(
        self, width: UnitMetric, depth: ListeningLayerMetric | None
    ) -> tuple[dict[str, UnitScores], Mapping[int, NDArray]]:
        """The scores of units under each of the metric's labels; of layers by block length, in the same
        pass, where `depth` is given."""
        setting = self.work.setting
        if isinstance(width, StaticUnitMetric):
            static = self.cluster.call(score_static, setting, width)
            return {width.label: static}, {} if depth is None else self._hear(None, depth)[1]
        assert isinstance(width, ListeningUnitMetric)
        return self._hear(width, depth)

    def _hear(
        self, width: ListeningUnitMetric | None, depth: ListeningLayerMetric | None
    ) -> tuple[dict[str, UnitScores], Mapping[int, NDArray]]:
        setting = self.work.setting
        ears = Listeners(family=setting.family, architecture=setting.architecture, width=width, depth=depth)
        groups = grouped(setting.splits.calibration, setting.micro_batch)
        parts = self.cluster.map(hear, shares(groups, self.work.workers), self.work, ears)
        evidence = merged([found for part in parts for found in part])
        self.seen.append(len(setting.splits.calibration) * setting.experiment.data.sequence_length)
        units = {} if width is None else ears.unit_scores(evidence)
        return units, {} if evidence.stream is None else evidence.stream.scores()

    def layers(self, metric: RemovalMetric, fewest: int) -> Mapping[int, NDArray]:
        """The scores of layers by block length, from runs of the teacher without them; `fewest` is the
        least that a student keeps."""
        setting = self.work.setting
        sequences = Sequences(
            read=setting.tokens().sequences,
            indices=tuple(setting.splits.calibration),
            separator=setting.separator,
        )
        material = Material(calibration=sequences, teacher=setting.teacher_folder, base=self.base)
        examples = metric.examples(material)
        size = setting.micro_batch
        batches = [(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]

        def measure(removals: Sequence[Removed]) -> NDArray:
            parts = shares(batches, self.work.workers)
            values = self.cluster.map(remove, parts, self.work, metric, examples, removals)
            return np.concatenate(values, axis=1)

        scores = score_layers(metric, setting.architecture.layers, fewest, measure)
        self.seen.append(sum(examples.batch(start, stop).ids.size for start, stop in batches))
        return scores


def worthwhile(operations: float, most: int) -> int:
    """How many processes to share so many operations out to: as many as there may be, or fewer where starting them
    would take longer than what they do."""
    return max(1, min(most, math.ceil(operations / _WORTH_A_PROCESS)))


def shares(items: Sequence[Item], workers: int) -> list[list[Item]]:
    """`items` in order, in at most `workers` runs of nearly equal length, none of them empty."""
    count = min(workers, len(items))
    bounds = [len(items) * number // count for number in range(count + 1)]
    return [list(items[low:high]) for low, high in itertools.pairwise(bounds)]


def score_static(setting: Setting, metric: StaticUnitMetric, report: Callable[..., None]) -> UnitScores:
    """In a worker: scores that need no pass."""
    return metric.score(setting.checkpoint, setting.family, setting.architecture)


def hear(groups: list[Group], work: Work, ears: Listeners, report: Callable[..., None]) -> list[Evidence]:
    """In a worker: the evidence of each of its groups."""
    setting = work.setting
    read, share = setting.tokens().sequences, setting.share()
    total = len(setting.splits.calibration)

    def progress(done: int) -> None:
        report("stage_progress", stage="importance", done=done, total=total, unit="sequences")

    if work.resident():
        return gather(setting.start(share), ears, groups, read, progress)
    sequences = sum(len(batch) for group in groups for batch in group)
    positions = 1 + max(ears.depth.blocks, default=0) if ears.depth is not None else 1
    model = StreamedLayerwise(setting.checkpoint, dtype=share.dtype, device=share.device)
    folder = work.streams_folder(sequences, positions)
    return gather_streamed(model, ears, groups, read, progress, folder, setting.separator)


def remove(
    batches: list[tuple[int, int]],
    work: Work,
    metric: RemovalMetric,
    examples: Examples,
    removals: Sequence[Removed],
    report: Callable[..., None],
) -> NDArray:
    """In a worker: the values of its batches of examples, see `removal_values`."""
    done_at = np.cumsum([stop - start for start, stop in batches])

    def progress(done: int) -> None:
        report(
            "stage_progress",
            stage="importance",
            done=int(done_at[done - 1]),
            total=len(examples),
            unit="examples",
        )

    given = [examples.batch(start, stop) for start, stop in batches]
    return removal_values(work.layerwise(), given, metric, removals, progress)
