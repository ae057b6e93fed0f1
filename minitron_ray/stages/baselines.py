"""Stage `baselines`: what the search's winner is compared with, trained as its trials were.

Rows go to `trials` under their origin, and to `sequence_losses` as phase `baseline` of the subject
`<origin>:<candidate id>`. A worker writes each rung as it is measured and keeps the state there, as a trial
does, so that after a kill what was in training goes on from its last rung. A shape cut by importance that
the search, or another baseline, has trained to the end is the same student: its rows are copied.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from minitron_ray.plan import Plan
from minitron_ray.results.store import Store
from minitron_ray.search.baselines import BASELINES, Baseline, affordable, best_of, drawn, largest
from minitron_ray.search.space import Candidate, CandidateRow
from minitron_ray.stages.choice import search_rows
from minitron_ray.stages.context import Context
from minitron_ray.stages.entrant import Bench, Entrant, Row, train_entrant
from minitron_ray.stages.importance import read_scores
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.undistilled import Cuts, score_on

SEARCH: Final = "search"
OF_THE_WINNER: Final[tuple[Baseline, ...]] = ("magnitude", "scratch")
"""Origins that train the shape of the search's winner."""
TWINS: Final = (SEARCH, "random", "largest_first")
"""Origins whose students begin as cuts by importance: of equal shape, they are the same student."""


def run(
    context: Context, plan: Plan, setting: Setting, signal: str | None, winner: str
) -> tuple[dict[str, Any], str]:
    """Trains what is not there yet; returns each baseline's best candidate. `winner` is the search's."""
    bench = Bench(
        setting=setting,
        scores=read_scores(context),
        signal=Path(signal) if signal else None,
        store=context.run.store,
        states=(context.run.folder / "baselines").resolve(),
        group=context.cluster.trial_group(),
    )
    forget_other_winners(plan, bench, winner)
    entrants = list(_entrants(context, plan, bench, winner))
    missing, copies = _to_do(entrants, bench.store)
    if missing:
        _train(context, missing, bench)
    for entrant in copies:
        _copy(bench, entrant)
    shutil.rmtree(bench.states, ignore_errors=True)  # of another winner's, too
    return _outcome(bench.store, entrants, winner)


def forget_other_winners(plan: Plan, bench: Bench, winner: str) -> None:
    """Drops what stood beside another winner, before a failed trial was tried again and won."""
    shapes = {row.candidate.id: row for row in plan.feasible}
    for origin in OF_THE_WINNER:
        for before, name in endings(bench.store):
            if before == origin and name != winner:
                bench.clear(Entrant(origin=origin, shape=shapes[name]))


def _train(context: Context, entrants: list[Entrant], bench: Bench) -> None:
    """Each by a worker, or a group as a search trial has."""
    cluster = context.cluster
    spread, at_once = cluster.map, cluster.mappers()
    if bench.group is not None:
        spread, at_once = cluster.map_groups, cluster.concurrent_trials()
    try:
        states = spread(train_entrant, entrants, bench, len(entrants) * bench.tokens, heeds_stop=True)
    finally:
        context.see_disk(bench.states)  # what a stop leaves
    context.disk = sum(sorted(states)[-at_once:])  # so many are there at a time, at most
    context.check_stop()


def endings(store: Store) -> dict[tuple[str, str], Row]:
    """The last row of every trial that has ended, by origin (`search` or a baseline) and candidate."""
    rows = [row for row in store.read("trials").to_pylist() if row["final"]]
    return {(row["origin"] or SEARCH, row["candidate_id"]): row for row in rows}


def search_tokens(store: Store) -> int:
    """Distillation tokens that the search's trials saw."""
    seen: dict[str, int] = defaultdict(int)
    for row in search_rows(store):
        seen[row["candidate_id"]] = max(seen[row["candidate_id"]], row["tokens"])
    return sum(seen.values())


def _entrants(context: Context, plan: Plan, bench: Bench, winner: str) -> Iterator[Entrant]:
    """The students of the baselines that are asked for."""
    asked, seed = context.experiment.searched.baselines, context.experiment.seed
    best = next(row for row in plan.feasible if row.candidate.id == winner)
    for origin in BASELINES:
        if origin not in asked:
            continue
        shapes = [best]
        if origin == "random":
            count = affordable(search_tokens(bench.store), bench.tokens, len(plan.feasible))
            shapes = drawn(plan.feasible, count, seed)
        elif origin == "largest_first":
            shapes = [_best_of_the_largest(context, plan, bench)]
        yield from (Entrant(origin=origin, shape=shape) for shape in shapes)


def _best_of_the_largest(context: Context, plan: Plan, bench: Bench) -> CandidateRow:
    """Scores the undistilled cuts of the largest shapes; those that are not the best end as stopped."""
    budget = context.experiment.budget
    assert budget is not None
    shapes = largest(plan.feasible, non_embedding=budget.count == "non_embedding")
    entrants = [Entrant(origin="largest_first", shape=shape) for shape in shapes]
    known = _undistilled(bench.store)
    missing = {one.candidate_id: one for one in entrants if one.candidate_id not in known}
    if missing:
        cuts = Cuts(
            setting=bench.setting,
            scores=bench.scores,
            stage="baselines",
            total=len(missing),
            write=partial(write_cut, bench, missing),
            group=bench.group,
        )
        score_on(context.cluster, [one.shape.candidate for one in missing.values()], cuts)
        context.check_stop()
    losses = _undistilled(bench.store)
    best = best_of(shapes, losses)
    for entrant in entrants:
        if entrant.shape is not best:
            loss = losses[entrant.candidate_id]
            bench.write(entrant, entrant.trial_row(0, "stopped", val_loss=loss))
    return best


def write_cut(bench: Bench, entrants: Mapping[str, Entrant], candidate: Candidate, loss: float) -> None:
    """The only row of its trial so far; `entrants` by candidate."""
    entrant = entrants[candidate.id]
    bench.write(entrant, entrant.trial_row(0, "running", val_loss=loss))


def _undistilled(store: Store) -> dict[str, float | None]:
    """Losses of the cuts that `largest_first` has scored, by candidate."""
    return {
        row["candidate_id"]: row["val_loss"]
        for row in store.read("trials").to_pylist()
        if row["origin"] == "largest_first" and row["rung"] == 0
    }


def _to_do(entrants: list[Entrant], store: Store) -> tuple[list[Entrant], list[Entrant]]:
    """Those to be trained, and those whose twin is, or will then be. One that failed is tried again."""
    done = {key for key, row in endings(store).items() if row["status"] == "completed"}
    missing: list[Entrant] = []
    copies: list[Entrant] = []
    for entrant in entrants:
        name = entrant.candidate_id
        if (entrant.origin, name) in done:
            continue
        twins = {(origin, name) for origin in TWINS if entrant.origin in TWINS}
        queued = {(other.origin, other.candidate_id) for other in missing}
        (copies if twins & (done | queued) else missing).append(entrant)
    return missing, copies


def _copy(bench: Bench, entrant: Entrant) -> None:
    """The twin's rows; of one that failed, where no other was completed."""
    ended, name = endings(bench.store), entrant.candidate_id
    twins = [origin for origin in TWINS if origin != entrant.origin and (origin, name) in ended]
    twins.sort(key=lambda origin: ("completed", "failed", "stopped").index(ended[origin, name]["status"]))
    source = twins[0]
    rows = [
        row
        for row in bench.store.read("trials").to_pylist()
        if (row["origin"] or SEARCH, row["candidate_id"]) == (source, name)
    ]
    bench.clear(entrant)
    bench.copy(entrant, rows, name if source == SEARCH else f"{source}:{name}")


def _outcome(store: Store, entrants: list[Entrant], winner: str) -> tuple[dict[str, Any], str]:
    """By origin the candidate that came out best, null where all failed; and a line for people."""
    ended = endings(store)
    found: dict[str, str | None] = {}
    told = []
    for origin in dict.fromkeys(entrant.origin for entrant in entrants):
        rows = [ended[origin, one.candidate_id] for one in entrants if one.origin == origin]
        good = [row for row in rows if row["status"] == "completed"]
        if not good:
            found[origin] = None
            told.append(f"{origin} failed ({rows[0]['reason']})")
            continue
        best = min(good, key=lambda row: (row["val_loss"], row["candidate_id"]))
        found[origin] = best["candidate_id"]
        lost = f", {len(rows) - len(good)} failed" if len(good) < len(rows) else ""
        of = f" (best of {len(rows)}{lost})" if len(rows) > 1 else ""
        told.append(f"{origin} {best['val_loss']:.3f}{of}")
    told.append(f"against the search's {ended[SEARCH, winner]['val_loss']:.3f}")
    return {"best": found}, ", ".join(told)
