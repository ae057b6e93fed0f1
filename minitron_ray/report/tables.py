"""The tables of one run, read into the few dictionaries that a ranking is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_ray.results.store import Store

_STATUSES = ("completed", "stopped", "failed", "running")
"""A trial that was run again after a failure keeps its best outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """All rows of one candidate: `rungs` by rung number, the latest row where a rung was written twice."""

    candidate_id: str
    rungs: Mapping[int, dict[str, Any]]
    status: str
    reason: str | None

    @property
    def shape(self) -> dict[str, Any]:
        """A row that carries the sizes; a trial that failed early may have left them out."""
        return next((row for row in self.rungs.values() if row["layers"] is not None), {})

    @property
    def last(self) -> dict[str, Any] | None:
        """The row of the last rung after the cut that has a loss."""
        measured = [n for n, row in self.rungs.items() if n > 0 and row["val_loss"] is not None]
        return self.rungs[max(measured)] if measured else None

    @property
    def seconds(self) -> float | None:
        known = [row["seconds"] for row in self.rungs.values() if row["seconds"] is not None]
        return max(known) if known else None


@dataclass(slots=True, kw_only=True)
class Distillation:
    """The steps of one candidate: tokens seen, seconds of stepping, the last validation loss."""

    tokens: int = 0
    seconds: float = 0.0
    val_loss: float | None = None
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """`evaluations` by (subject, phase, metric); `candidates`, `trials`, `exports`, `steps` by candidate."""

    evaluations: Mapping[tuple[str, str, str], dict[str, Any]]
    candidates: Mapping[str, dict[str, Any]]
    trials: Mapping[str, Trial]
    distillations: Mapping[str, Distillation]
    exports: Mapping[str, dict[str, Any]]


def read(store: Store) -> Tables:
    """Reads what a run has written so far."""
    return Tables(
        evaluations={
            (row["subject"], row["phase"], row["metric"]): row
            for row in store.read("evaluations").to_pylist()
        },
        candidates={row["candidate_id"]: row for row in store.read("candidates").to_pylist()},
        trials=_trials(store),
        distillations=_distillations(store),
        exports={row["candidate_id"]: row for row in store.read("exports").to_pylist()},
    )


def _trials(store: Store) -> dict[str, Trial]:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in store.read("trials").to_pylist():
        if row["origin"] in (None, "search"):  # baselines stand in a section of their own
            rows[row["candidate_id"]].append(row)
    return {name: _trial(name, found) for name, found in rows.items()}


def _trial(candidate_id: str, rows: list[dict[str, Any]]) -> Trial:
    status = min((row["status"] or "running" for row in rows), key=_STATUSES.index)
    if status in ("completed", "stopped"):  # what an earlier, failed attempt left behind it is not its
        end = max(row["rung"] for row in rows if row["status"] == status)
        rows = [row for row in rows if row["rung"] <= end]
    rungs: dict[int, dict[str, Any]] = {}
    for row in rows:
        # A failure has no loss to offer for its rung, so it replaces none.
        if row["rung"] not in rungs or row["val_loss"] is not None:
            rungs[row["rung"]] = row
    reasons = [row["reason"] for row in rows if row["reason"]]
    reason = reasons[-1] if status == "failed" and reasons else None
    return Trial(candidate_id=candidate_id, rungs=rungs, status=status, reason=reason)


def _distillations(store: Store) -> dict[str, Distillation]:
    columns = ["candidate_id", "step", "tokens", "val_loss", "tokens_per_second"]
    found: dict[str, Distillation] = defaultdict(Distillation)
    for row in store.read("steps").select(columns).to_pylist():
        if row["candidate_id"] == "teacher":  # its correction
            continue
        found[row["candidate_id"]].steps[row["step"]] = row
    for distillation in found.values():
        _sum_up(distillation)
    return dict(found)


def _sum_up(distillation: Distillation) -> None:
    for _, row in sorted(distillation.steps.items()):
        if row["tokens_per_second"]:
            distillation.seconds += (row["tokens"] - distillation.tokens) / row["tokens_per_second"]
        distillation.tokens = row["tokens"]
        if row["val_loss"] is not None:
            distillation.val_loss = row["val_loss"]
