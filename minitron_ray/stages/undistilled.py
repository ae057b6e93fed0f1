"""Undistilled cuts and what they lose: a forward pass each over validation sequences.

Where a search trial is a group of processes that share its student, a group shares each cut: one that does
not fit a device in training may not fit it in a forward pass either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minitron_ray.distillation.loop import Share
from minitron_ray.execution.cluster import Cluster, GroupSize, in_group
from minitron_ray.importance.scores import Scores
from minitron_ray.search.space import Candidate
from minitron_ray.stages.scoring import shares
from minitron_ray.stages.setting import Setting

if TYPE_CHECKING:
    from minitron_ray.execution.train_group import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """What a worker needs to score cuts. Picklable."""

    setting: Setting
    scores: Scores
    stage: str
    """That tells of the progress."""
    total: int
    """Cuts of all workers."""
    write: Callable[[Candidate, float], None]
    """Keeps a cut's loss, nats a token, as soon as it is there."""
    group: GroupSize | None = None
    """The processes that share a cut; None where one holds it."""
    sequences: int | None = None
    """Of the validation, the first so many; None for all."""


def score_on(cluster: Cluster, candidates: Sequence[Candidate], cuts: Cuts) -> None:
    """Has the workers of a cluster score cuts by `cuts.write`, a share each."""
    if cuts.group is None:
        cluster.map(score, shares(candidates, cluster.mappers()), cuts)
    else:
        jobs = [(part, cuts) for part in shares(candidates, cluster.concurrent_trials())]
        cluster.map_groups(in_group, jobs, cuts.group, score_in_group)


def score(candidates: list[Candidate], cuts: Cuts, report: Callable[..., None]) -> None:
    """In a worker: its share."""
    _score(candidates, cuts, cuts.setting.share(), report)


def score_in_group(job: tuple[list[Candidate], Cuts], worker: Worker) -> None:
    """On every rank: cuts that they share. Rank 0 writes."""
    candidates, cuts = job
    share = cuts.setting.share(worker.rank, worker.world, worker.device)
    _score(candidates, cuts, share, worker.report)


def _score(candidates: list[Candidate], cuts: Cuts, share: Share, report: Callable[..., Any]) -> None:
    setting = cuts.setting
    for done, candidate in enumerate(candidates, start=1):
        # In no variable, which would hold it beside the next one.
        loss = setting.measure(
            setting.undistilled(candidate, cuts.scores, share), share, first=cuts.sequences
        ).loss
        if share.rank == 0:
            cuts.write(candidate, loss)
        report("stage_progress", stage=cuts.stage, done=done, total=cuts.total, unit="cuts")
