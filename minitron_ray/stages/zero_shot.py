"""Stage `zero_shot`: what undistilled cuts of the feasible shapes lose, for the sampler to start from.

A pass over a few sequences costs a small part of a trial. Distillation changes the ranks, so this
seeds the search and decides nothing. Each cut is written as it is scored: after a kill only those that
are not there yet are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from minitron_ray.core.errors import MinitronError
from minitron_ray.plan import Plan
from minitron_ray.results.store import Store
from minitron_ray.search.space import Candidate
from minitron_ray.stages.context import Context
from minitron_ray.stages.importance import read_scores
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.undistilled import Cuts, score_on

Item = TypeVar("Item")


def run(context: Context, plan: Plan, setting: Setting) -> tuple[dict[str, Any], str]:
    """Writes the table `zero_shot`."""
    section = context.experiment.searched.zero_shot
    assert section is not None
    candidates = [row.candidate for row in evenly(plan.feasible, section.shapes)]
    sequences = min(section.sequences, len(setting.splits.validation))
    store = context.run.store
    known = scored(store, sequences)
    missing = [candidate for candidate in candidates if candidate.id not in known]
    context.tokens = 0
    if missing:
        cuts = Cuts(
            setting=setting,
            scores=read_scores(context),
            stage="zero_shot",
            total=len(missing),
            write=partial(write, store, sequences),
            group=context.cluster.trial_group(),
            sequences=sequences,
        )
        try:
            score_on(context.cluster, missing, cuts)
        finally:
            done = scored(store, sequences).keys() - known.keys()
            context.tokens = len(done) * sequences * context.experiment.data.sequence_length
        context.check_stop()
        known = scored(store, sequences)
    losses = {candidate.id: known[candidate.id] for candidate in candidates}
    best, worst = extremes(losses)
    shape = plan.candidate(best).shape_text()
    told = f"losses {losses[best]:.3f} to {losses[worst]:.3f}, best {best} ({shape})"
    return {"cuts": len(losses)}, f"{len(losses)} cuts on {sequences} sequences, {told}"


def scored(store: Store, sequences: int) -> dict[str, float | None]:
    """By candidate what cuts lose on so many sequences, None where that is not finite."""
    rows = store.read("zero_shot").to_pylist()
    return {row["candidate_id"]: row["val_loss"] for row in rows if row["sequences"] == sequences}


def extremes(losses: Mapping[str, float | None]) -> tuple[str, str]:
    """The best and the worst of the cuts. Raises MinitronError where none has a finite loss."""
    finite = sorted((loss, name) for name, loss in losses.items() if loss is not None)
    if not finite:
        raise MinitronError(
            f"zero_shot: none of {len(losses)} undistilled cuts has a finite loss; check the teacher's "
            f"weights, or set search.zero_shot: null"
        )
    return finite[0][1], finite[-1][1]


def read_zero_shot(store: Store) -> dict[str, float]:
    """The finite losses by candidate; empty where no cuts were scored."""
    rows = store.read("zero_shot").select(["candidate_id", "val_loss"]).to_pylist()
    return {row["candidate_id"]: row["val_loss"] for row in rows if row["val_loss"] is not None}


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """All of `items`, or `most` of them at even distances, beginning with the first."""
    count = min(most, len(items))
    return [items[len(items) * number // count] for number in range(count)]


def write(store: Store, sequences: int, candidate: Candidate, loss: float) -> None:
    """The row of a cut that was scored on so many sequences; null where the loss is not finite."""
    row = {
        "candidate_id": candidate.id,
        "val_loss": loss if math.isfinite(loss) else None,
        "sequences": sequences,
    }
    store.append("zero_shot", [row], writer=f"zero_shot-{candidate.id}", sequence=0)
