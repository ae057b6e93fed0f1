"""What a search found beside its winner: error bars, agreement of ranks, lessons, baselines.

All of it stands in the tables `comparisons`, `rank_correlations`, `lessons` and `trials`; here it is
only read, and told in sections.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from minitron_ray.core.units import format_count
from minitron_ray.report.sections import Section
from minitron_ray.results.store import Store

Row = dict[str, Any]

NONE: Final = "-"
SEARCH: Final = "search"
_FLIPS: Final = 5
"""Most of them that a report tells; the table `lessons` has more."""
_FEWEST: Final = 4
"""Candidates below which no tau is told: the orders of three agree in full by chance once in six."""
_OVER: Final = ("search", "search and random", "random")
"""Over whom ranks are compared, in the order shown."""
_BASELINES: Final = {
    "random": "the best of {count} drawn by lot, each trained to the end, for the search's tokens in all",
    "largest_first": "of the ten largest shapes the one with the best undistilled cut",
    "magnitude": "the search's best shape, cut by the size of weights",
    "scratch": "the search's best shape, from random weights",
}
"""What each origin of a trial other than the search is; `count` is how many were trained."""
_OTHER_WEIGHTS: Final = ("magnitude", "scratch")
"""Of the winner's shape, but not the winner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Rows of the tables, without experiment and run."""

    comparisons: tuple[Row, ...]
    correlations: tuple[Row, ...]
    lessons: tuple[Row, ...]
    baselines: tuple[Row, ...]
    """Rows of `trials` with which a baseline ended."""

    def behind(self, subject: str, phase: str) -> Row | None:
        """How far it is behind the best of this phase, after most tokens; None for the best, and where it was not
        compared."""
        wanted = (subject, phase, "best")
        rows = [r for r in self.comparisons if (r["subject"], r["phase"], r["against"]) == wanted]
        return max(rows, key=lambda row: row["tokens"], default=None)


def read_findings(store: Store) -> Findings:
    """Of a run, finished or not."""
    ended = [row for row in _rows(store, "trials") if row["final"] and row["origin"] in _BASELINES]
    return Findings(
        comparisons=_rows(store, "comparisons"),
        correlations=_rows(store, "rank_correlations"),
        lessons=_rows(store, "lessons"),
        baselines=tuple(ended),
    )


def interval_text(row: Mapping[str, Any]) -> str:
    """`+0.0338 [+0.0121, +0.0569]`: a difference and its 95 % interval; `=` where the two are tied."""
    low, high = (f"{row[end]:+.4f}" if math.isfinite(row[end]) else "?" for end in ("low", "high"))
    return f"{row['difference']:+.4f} [{low}, {high}]{' =' if row['tied'] else ''}"


def sections(found: Findings, names: Mapping[str, str]) -> Iterator[Section]:
    """The sections that have something to say. `names` are the candidates' shapes."""
    if found.baselines:
        yield _baselines(found, names)
    if any(row["kind"] == "front" for row in found.lessons):
        yield _front(found, names)
    if found.correlations:
        yield _agreement(found)
    if found.lessons:
        yield _lessons(found, names)


def _baselines(found: Findings, names: Mapping[str, str]) -> Section:
    by_origin: dict[str, list[Row]] = defaultdict(list)
    for row in found.baselines:
        by_origin[row["origin"]].append(row)
    rows, notes, ahead = [], [], []
    for origin in (name for name in _BASELINES if name in by_origin):
        trained = [row for row in by_origin[origin] if row["status"] != "stopped"]  # others were only scored
        tokens = format_count(sum(row["tokens"] or 0 for row in trained))
        best = _best_of(trained)
        if best is None:
            rows.append((origin, NONE, NONE, NONE, tokens))
        else:
            name = best["candidate_id"]
            compared = found.behind(f"{origin}:{name}", "baseline")
            same = origin not in _OTHER_WEIGHTS and compared is not None and compared["other"] == name
            behind = "the same student" if same else interval_text(compared) if compared else NONE
            rows.append((origin, names.get(name, name), f"{best['val_loss']:.4f}", behind, tokens))
            if compared is not None and compared["high"] < 0:
                ahead.append(origin)
        notes.append(f"{origin}: {_BASELINES[origin].format(count=len(trained))}")
        notes += [f"failed: {origin} {_failure(row, names)}" for row in trained if row["status"] == "failed"]
    if ahead:
        notes.append(f"better than the search's best, beyond the error bars: {', '.join(ahead)}")
    return Section(
        title="Baselines, trained by the search's recipe",
        header=("baseline", "shape", "loss", "behind the search\n[95 %]", "tokens"),
        rows=tuple(rows),
        words=frozenset({0, 1}),
        notes=tuple(notes),
    )


def _best_of(trials: Iterable[Row]) -> Row | None:
    completed = [row for row in trials if row["status"] == "completed" and row["val_loss"] is not None]
    return min(completed, key=lambda row: (row["val_loss"], row["candidate_id"]), default=None)


def _failure(row: Row, names: Mapping[str, str]) -> str:
    reason = " ".join((row["reason"] or "no reason was recorded").split())
    return f"{names.get(row['candidate_id'], row['candidate_id'])}: {reason}"


def _front(found: Findings, names: Mapping[str, str]) -> Section:
    front = [row for row in found.lessons if row["kind"] == "front"]
    against = str(front[0]["axis"])
    figure = {"latency": lambda cost: f"{1000 * cost:.2f}"}.get(against, format_count)
    header = {"latency": "ms a pass", "flops": "FLOPs a token"}.get(against, against)
    return Section(
        title=f"Front of loss and {against}: no trial is better in both",
        header=("shape", "loss", header, "candidate"),
        rows=tuple(
            (
                names.get(row["candidate_id"], row["candidate_id"]),
                f"{row['best_loss']:.4f}",
                figure(row["cost"]),
                row["candidate_id"],
            )
            for row in front
        ),
        words=frozenset({0, 3}),
    )


def _agreement(found: Findings) -> Section:
    told: dict[tuple[str, str, str], Row] = {}
    for row in sorted(found.correlations, key=_place):
        first = "zero-shot" if row["comparing"] == "zero_shot" else _rung(row["from_tokens"])
        told.setdefault((first, _rung(row["to_tokens"]), _over(row)), row)
    few = Counter(_over(row) for row in told.values() if row["candidates"] < _FEWEST)
    notes = [
        "over the candidates that were measured at both; of the search at later rungs only those that halving "
        "did not stop"
    ]
    if any(_over(row) != SEARCH for row in told.values()):
        notes.append(
            "random: drawn by lot and all trained to the end, so the only ones that halving has not chosen; a "
            "candidate that is among both counts once"
        )
    if few:
        rows = ", ".join(f"{count} over {over}" for over, count in few.items())
        notes.append(
            f"no tau is told of fewer than {_FEWEST} candidates: left out {rows} (table rank_correlations)"
        )
    return Section(
        title="Agreement of ranks (Kendall's tau-b)",
        header=("ranks at", "and at", "over", "tau", "p-value", "candidates"),
        rows=tuple(
            (*at, f"{row['tau']:+.2f}", _chance(row["p_value"]), str(row["candidates"]))
            for at, row in told.items()
            if row["candidates"] >= _FEWEST
        ),
        words=frozenset({0, 1, 2}),
        notes=tuple(notes),
    )


def _place(row: Row) -> tuple[bool, int, int, int]:
    """Where a row of the table stands in the report."""
    return (
        row["comparing"] != "zero_shot",
        row["from_tokens"],
        row["to_tokens"],
        _OVER.index(_over(row)),
    )


def _over(row: Row) -> str:
    """Rows from before random baselines were counted are the search's."""
    return row["over"] or SEARCH


def _lessons(found: Findings, names: Mapping[str, str]) -> Section:
    sizes = [row for row in found.lessons if row["kind"] == "size" and row["tokens"] > 0]
    rung = _telling(sizes)
    importance = {
        row["axis"]: row["importance"]
        for row in found.lessons
        if row["kind"] == "importance" and row["tokens"] == rung
    }
    there = [row for row in sizes if row["tokens"] == rung]
    rows, last = [], None
    for row in there:
        first, last = row["axis"] != last, row["axis"]
        share = f"{100 * importance[last]:.0f}%" if last in importance and first else ""
        mark = "dead" if row["dead_zone"] else ""
        losses = (f"{row['best_loss']:.4f}", f"{row['mean_loss']:.4f}")
        rows.append((last if first else "", f"{row['size']:g}", str(row["trials"]), *losses, share, mark))
    notes = []
    if importance:
        notes.append("importance: share of the axis in what sets the best trials apart (PED-ANOVA)")
    if any(row["dead_zone"] for row in there):
        notes.append("dead: two trials or more, all in the worse half, none tied with the best")
    shown = [at for at in range(7) if at < 5 or any(row[at] for row in rows)]
    header = ("axis", "size", "trials", "best loss", "mean loss", "importance", "zone")
    return Section(
        title="Lessons" + (f": sizes after {_rung(rung)}" if there else ""),
        header=tuple(header[at] for at in shown),
        rows=tuple(tuple(row[at] for at in shown) for row in rows),
        words=frozenset({0} | {place for place, at in enumerate(shown) if at == 6}),
        notes=(*notes, *_flips(found, names)),
    )


def _flips(found: Findings, names: Mapping[str, str]) -> Iterator[str]:
    """Those where the two were told apart both times; of the others only how many there are."""
    flipped = [row for row in found.lessons if row["kind"] == "flip"]
    certain = [row for row in flipped if row["certain"]]
    for row in certain[:_FLIPS]:
        winner, loser = (names.get(row[name], row[name]) for name in ("winner", "loser"))
        before = "as cut" if row["from_tokens"] == 0 else f"after {_rung(row['from_tokens'])}"
        yield (
            f"flipped: {winner} was {row['before']:.4f} behind {loser} {before}, and "
            f"{-row['after']:.4f} ahead after {_rung(row['tokens'])}"
        )
    if not flipped:
        yield "no two candidates changed places between the rungs that both reached"
    elif not certain:
        count = (
            f"{len(flipped)} pairs changed places, none"
            if len(flipped) > 1
            else "one pair changed places, not"
        )
        yield f"{count} beyond the error bars (table lessons)"
    elif more := len(flipped) - len(certain[:_FLIPS]):
        sure = len(certain) - len(certain[:_FLIPS])
        yield f"{more} more changed places, {sure or 'none'} of them beyond the error bars (table lessons)"


def _telling(sizes: list[Row]) -> int:
    """Tokens of the rung with the most trials; of several, the last."""
    trials: dict[int, int] = defaultdict(int)
    for row in sizes:
        trials[row["tokens"]] += row["trials"]
    return max(trials, key=lambda tokens: (trials[tokens], tokens), default=0)


def _rung(tokens: int) -> str:
    return "the cut" if tokens == 0 else f"{format_count(tokens)} tokens"


def _chance(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _rows(store: Store, table: str) -> tuple[Row, ...]:
    return tuple(
        {name: value for name, value in row.items() if name not in ("experiment", "run_id")}
        for row in store.read(table).to_pylist()
    )
