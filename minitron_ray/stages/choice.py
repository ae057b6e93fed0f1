"""The search's end: which candidates go on, and what its tables say about how sure that is.

`choose` decides. `conclude` writes the tables `comparisons`, `rank_correlations` and `lessons`; all
three follow from `trials`, `zero_shot` and `sequence_losses`, so they are written anew after every
stage that adds to those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from minitron_ray.core.errors import MinitronError
from minitron_ray.plan import Plan
from minitron_ray.results.store import Store
from minitron_ray.search.choice import intervals, keep_best
from minitron_ray.search.halving import front_ranks, in_order
from minitron_ray.search.lessons import (
    Course,
    flips,
    importances,
    populations,
    rank_agreements,
    rungs_of,
    size_lessons,
)
from minitron_ray.search.space import SPACE_AXES, Candidate, SpaceLike
from minitron_ray.stages.objectives import Cost, first_costs

ENDED: Final = ("completed", "stopped", "failed")

Losses = NDArray[np.float64]
Known = dict[tuple[str, str, int], Losses]
Row = dict[str, Any]


def choose(plan: Plan, store: Store, cost: Cost) -> tuple[dict[str, Any], str]:
    """The candidates that go on, best first, and a line about the search. Of a search for a front only
    those on it, by their loss.

    Raises MinitronError where no trial was completed with a loss.
    """
    trials = search_rows(store)
    rows = [row for row in trials if row["final"]]
    losses = _completed(rows, sequence_losses(store))
    if not losses:
        reasons = sorted({row["reason"] for row in rows if row["reason"]})
        why = "; ".join(reasons) or "all were stopped"
        raise MinitronError(f"none of {len(rows)} trials was completed: {why}; see logs/ in the run")
    keep = plan.experiment.searched.keep
    front = _front(losses, trials, cost)
    chosen = keep_best({name: losses[name] for name in front or losses}, keep, seed=plan.experiment.seed)
    counts = {status: sum(row["status"] == status for row in rows) for status in ENDED}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if keep == "ties" and len(chosen) > 1:
        told += f" ({len(chosen)} tied, all are kept)"
    elif keep != "ties" and len(chosen) < keep:
        which = "trials on the front" if front else "completed trials"
        told += f" (keep asks for {keep}; only {which} can be kept)"
    if front:
        told += f"; {len(front)} on the front of loss and {cost.name}"
    best = chosen[0]
    shape, loss = plan.candidate(best).shape_text(), float(losses[best].mean())
    return {"chosen": list(chosen)}, f"{told}; best {best} ({shape}), loss {loss:.3f}"


def conclude(plan: Plan, store: Store) -> None:
    """Writes what follows from the trials so far; nothing for an experiment without a search."""
    if plan.experiment.search is None:
        return
    seed, rows, known = plan.experiment.seed, search_rows(store), sequence_losses(store)
    courses = _courses(plan, rows, known)
    cuts = [row for row in store.read("zero_shot").to_pylist() if row["val_loss"] is not None]
    zero_shot = {row["candidate_id"]: row["val_loss"] for row in cuts}
    correlations = [
        {
            "comparing": found.comparing,
            "from_tokens": found.from_tokens,
            "to_tokens": found.to_tokens,
            "tau": found.agreement.tau,
            "p_value": found.agreement.p_value,
            "candidates": found.agreement.n,
            "over": over,
        }
        for over, compared in populations(courses, _drawn(plan, store, known))
        for found in rank_agreements(compared, zero_shot)
    ]
    written = {
        "comparisons": list(_comparisons(rows, known, seed)),
        "rank_correlations": correlations,
        "lessons": [*_lessons(courses, seed), *_front_rows(rows, known, Cost(plan))],
    }
    for table, rows in written.items():
        store.append(table, rows, writer="conclusion", sequence=0)


def _comparisons(trials: list[Row], known: Known, seed: int) -> Iterator[Row]:
    """Search: all against the winner at their last rung, and completed ones against the next better one.
    Baselines against the winner. Distilled students against the best of them."""
    rows = [row for row in trials if row["final"]]
    completed = _completed(rows, known)
    if completed:
        order = keep_best(completed, len(completed), seed=seed)
        pairs = [(name, order[0], "best", "search", _tokens(rows, name)) for name in order[1:]]
        pairs += [(b, a, "next", "search", _tokens(rows, b)) for a, b in pairwise(order)]
        pairs += [
            (row["candidate_id"], order[0], "best", "search", row["tokens"])
            for row in rows
            if row["status"] == "stopped"
        ]
        baselines = sorted({(subject, tokens) for subject, phase, tokens in known if phase == "baseline"})
        pairs += [(subject, order[0], "best", "baseline", tokens) for subject, tokens in baselines]
        yield from _compared(pairs, known, seed)
    distilled = {subject: tokens for subject, phase, tokens in sorted(known) if phase == "distilled"}
    students = {name: known[name, "distilled", tokens] for name, tokens in distilled.items()}
    order = keep_best(students, len(students), seed=seed) if students else ()
    pairs = [(name, order[0], "best", "distilled", distilled[name]) for name in order[1:]]
    pairs += [(b, a, "next", "distilled", distilled[b]) for a, b in pairwise(order)]
    yield from _compared(pairs, known, seed)


def _compared(pairs: list[tuple[str, str, str, str, int]], known: Known, seed: int) -> Iterator[Row]:
    """One row a pair; none where one of the two was not measured after these tokens, or not finite."""
    there, columns = [], []
    for subject, other, against, phase, tokens in pairs:
        ours = known.get((subject, phase, tokens))
        theirs = known.get((other, "search" if phase == "baseline" else phase, tokens))
        if ours is None or theirs is None or len(ours) != len(theirs):
            continue
        difference = ours - theirs
        if np.isfinite(difference).all():
            there.append((subject, other, against, phase, tokens))
            columns.append(difference)
    if not columns:
        return
    for named, found in zip(there, intervals(np.stack(columns, axis=1), seed=seed), strict=True):
        fields = dict(zip(("subject", "other", "against", "phase", "tokens"), named, strict=True))
        yield {**fields, **asdict(found), "tied": found.tied, "sequences": len(columns[0])}


def _lessons(courses: list[Course], seed: int) -> Iterator[Row]:
    for lesson in size_lessons(courses, seed=seed):
        yield {"kind": "size", **asdict(lesson)}
    for tokens in rungs_of(courses):
        trials = sum(tokens in course.losses for course in courses)
        for axis, share in importances(courses, tokens).items():
            yield {
                "kind": "importance",
                "axis": axis,
                "tokens": tokens,
                "importance": share,
                "trials": trials,
            }
    for flip in flips(courses, seed=seed):
        yield {
            "kind": "flip",
            "winner": flip.winner,
            "loser": flip.loser,
            "from_tokens": flip.from_tokens,
            "tokens": flip.to_tokens,
            "before": flip.before.difference,
            "after": flip.after.difference,
            "certain": flip.certain,
        }


def _front_rows(trials: list[Row], known: Known, cost: Cost) -> Iterator[Row]:
    rows = [row for row in trials if row["final"]]
    losses = _completed(rows, known)
    for name, value in _front(losses, trials, cost).items():
        yield {
            "kind": "front",
            "axis": cost.name,
            "candidate_id": name,
            "cost": value,
            "best_loss": float(losses[name].mean()),
            "tokens": _tokens(rows, name),
        }


def _front(losses: Mapping[str, Losses], trials: list[Row], cost: Cost) -> dict[str, float]:
    """Completed candidates that no other beats in loss and cost, by their loss, with their costs; none
    where the search has one objective."""
    costs = {name: value for name, value in first_costs(trials, cost).items() if name in losses}
    means = {name: float(losses[name].mean()) for name in costs}
    ranks = front_ranks(means, costs)
    return {name: costs[name] for name in in_order(means, costs) if ranks[name] == 0}


def _courses(plan: Plan, rows: list[Row], known: Known) -> list[Course]:
    """Every candidate of the search that ended, failed ones left out."""
    ended = {row["candidate_id"] for row in rows if row["status"] in ("completed", "stopped")}
    return [_course(plan, name, name, ("cut", "search"), known) for name in sorted(ended)]


def _drawn(plan: Plan, store: Store, known: Known) -> list[Course]:
    """The shapes drawn by lot that were trained to the end: by the trials' recipe, and never stopped."""
    rows = store.read("trials").to_pylist()
    ended = {r["candidate_id"] for r in rows if r["origin"] == "random" and r["status"] == "completed"}
    return [_course(plan, name, f"random:{name}", ("baseline",), known) for name in sorted(ended)]


def _course(plan: Plan, name: str, subject: str, phases: tuple[str, ...], known: Known) -> Course:
    """Of the rungs whose losses are finite."""
    return Course(
        candidate_id=name,
        sizes=_sizes(plan.candidate(name), plan.experiment.searched.space),
        losses={
            tokens: losses
            for (of, phase, tokens), losses in known.items()
            if of == subject and phase in phases and np.isfinite(losses).all()
        },
    )


def _sizes(candidate: Candidate, space: SpaceLike) -> dict[str, float]:
    """By axis that the space names: others are the teacher's, or follow one of these. The MLP by its ratio to the
    hidden size where the space gives it so."""
    named = (axis for axis in SPACE_AXES if getattr(space, axis) is not None)
    sizes: dict[str, float] = {axis: getattr(candidate, axis) for axis in named}
    if space.mlp is not None and (ratios := space.mlp.ratios):
        sizes["mlp_ratio"] = min(ratios, key=lambda ratio: abs(ratio * candidate.hidden - sizes["mlp"]))
        del sizes["mlp"]
    return sizes


def search_rows(store: Store) -> list[Row]:
    """Rows of the table `trials` without those of baselines."""
    return [row for row in store.read("trials").to_pylist() if row["origin"] in (None, "search")]


def sequence_losses(store: Store) -> Known:
    """By subject, phase and tokens, in the order of the validation sequences."""
    grouped = store.read("sequence_losses").group_by(["subject", "phase", "tokens"], use_threads=False)
    found: Known = {}
    for row in grouped.aggregate([("sequence", "list"), ("loss", "list")]).to_pylist():
        losses = dict(zip(row["sequence_list"], row["loss_list"], strict=True))
        in_order = [losses[sequence] for sequence in sorted(losses)]
        found[row["subject"], row["phase"], row["tokens"] or 0] = np.array(in_order, np.float64)
    return found


def _completed(rows: list[Row], known: Known) -> dict[str, Losses]:
    """The losses of trials that ran to their end, where they are finite."""
    ended = {row["candidate_id"]: row["tokens"] for row in rows if row["status"] == "completed"}
    losses = {name: known[name, "search", tokens] for name, tokens in ended.items()}
    return {name: values for name, values in losses.items() if np.isfinite(values).all()}


def _tokens(rows: list[Row], candidate_id: str) -> int:
    """Those of the completed trial."""
    return max(row["tokens"] for row in rows if row["candidate_id"] == candidate_id)
