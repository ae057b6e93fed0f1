"""`ProgressModel`: what the events so far say about a run. Plain data; nothing here draws or waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from minitron_ray.core.events import Event
from minitron_ray.results.runs import STAGES

_PLACES = {name: place for place, name in enumerate(STAGES)}
_WINDOW = 120.0
"""Seconds of progress that the remaining time is reckoned from."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """`status` is waiting, running, finished, reused or failed; `done` of `total` in `unit`."""

    name: str
    status: str = "waiting"
    done: float = 0
    total: float | None = None
    unit: str = ""
    summary: str = ""
    seconds: float | None = None
    started_at: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    note: str = ""
    history: deque[tuple[float, float]] = field(default_factory=deque)
    """(time, done) over the last `_WINDOW` seconds. A resumed stage begins at where it was, not at 0."""

    @property
    def fraction(self) -> float | None:
        """Between 0 and 1, or None while the amount of work is unknown."""
        if self.status in ("finished", "reused"):
            return 1.0
        return min(self.done / self.total, 1.0) if self.total else None

    def remaining(self, now: float) -> float | None:
        """Seconds to go at the pace of the last `_WINDOW` seconds; None without a pace, or once overdue."""
        if self.status != "running" or not self.total or len(self.history) < 2:
            return None
        (first_at, first), (last_at, last) = self.history[0], self.history[-1]
        if last <= first or last_at <= first_at:
            return None
        pace = (last - first) / (last_at - first_at)
        left = (self.total - last) / pace - (now - last_at)
        return left if left > 0 else None


@dataclass(slots=True, kw_only=True)
class Trial:
    """`status` is running, completed, stopped or failed; `loss` is of validation where one was measured."""

    candidate_id: str
    shape: str = ""
    parameters: int | None = None
    status: str = "running"
    tokens: int = 0
    total_tokens: int | None = None
    cut_loss: float | None = None
    """Validation loss before any distillation."""
    val_loss: float | None = None
    train_loss: float | None = None
    tokens_per_second: float | None = None
    reason: str = ""


class ProgressModel:
    """The state of a run, made of its events alone. Not thread-safe: the owner holds a lock."""

    def __init__(self, stages: Sequence[str] = STAGES) -> None:
        self.experiment = ""
        self.run_id = ""
        self.folder = ""
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.status = "running"
        self.note = ""
        self._stages = {name: Stage(name=name) for name in stages}
        self._trials: dict[str, Trial] = {}

    @property
    def stages(self) -> Mapping[str, Stage]:
        """All stages in the order they go, also those that have not begun."""
        return MappingProxyType(self._stages)

    @property
    def trials(self) -> Mapping[str, Trial]:
        """By candidate, in the order they began."""
        return MappingProxyType(self._trials)

    def running_stage(self) -> Stage | None:
        """The stage that is at work."""
        return next((stage for stage in self._stages.values() if stage.status == "running"), None)

    def elapsed(self, now: float) -> float:
        """Seconds since the first event, until the run ended."""
        if self.started_at is None:
            return 0.0
        return (self.ended_at or now) - self.started_at

    def apply(self, event: Event) -> None:
        """Takes in one event. A field that an event leaves out keeps its value."""
        if self.started_at is None:
            self.started_at = event.at
        getattr(self, f"_{event.kind}")(event.at, event.fields)

    def _run_started(self, at: float, fields: dict[str, Any]) -> None:
        self.experiment, self.run_id = fields["experiment"], fields["run_id"]
        self.folder = str(fields.get("folder", ""))

    def _stage_started(self, at: float, fields: dict[str, Any]) -> None:
        name = self._stage(fields).name
        self._stages[name] = Stage(
            name=name,
            status="running",
            started_at=at,
            total=fields.get("total"),
            unit=fields.get("unit") or "",
        )

    def _stage_progress(self, at: float, fields: dict[str, Any]) -> None:
        stage = self._stage(fields)
        if stage.status not in ("waiting", "running"):
            return  # a worker's word that comes after the stage's end
        stage.status = "running"
        if fields.get("unit") not in (None, stage.unit):
            stage.history.clear()  # other work, whose pace says nothing of what comes now
        _update(stage, fields, "done", "total", "unit", "loss", "tokens_per_second", "note")
        if fields.get("done") is not None:
            stage.history.append((at, stage.done))
            while len(stage.history) > 2 and at - stage.history[0][0] > _WINDOW:
                stage.history.popleft()

    def _stage_reused(self, at: float, fields: dict[str, Any]) -> None:
        self._end(fields, "reused")

    def _stage_finished(self, at: float, fields: dict[str, Any]) -> None:
        self._end(fields, "finished")

    def _stage_failed(self, at: float, fields: dict[str, Any]) -> None:
        self._end({**fields, "summary": fields.get("error", "")}, "failed")

    def _trial_started(self, at: float, fields: dict[str, Any]) -> None:
        name = fields["candidate_id"]
        self._trials[name] = Trial(candidate_id=name)
        _update(self._trials[name], fields, "shape", "parameters")

    def _trial_progress(self, at: float, fields: dict[str, Any]) -> None:
        trial = self._trial(fields)
        if fields.get("val_loss") is not None and not fields.get("tokens"):
            trial.cut_loss = fields["val_loss"]
        names = ("tokens", "total_tokens", "val_loss", "train_loss", "tokens_per_second")
        _update(trial, fields, *names)

    def _trial_finished(self, at: float, fields: dict[str, Any]) -> None:
        _update(self._trial(fields), fields, "status", "val_loss", "tokens", "reason", "shape", "parameters")

    def _note(self, at: float, fields: dict[str, Any]) -> None:
        self.note = fields["text"]

    def _run_finished(self, at: float, fields: dict[str, Any]) -> None:
        self.status = fields["status"]
        self.ended_at = at
        self.note = ""

    def _end(self, fields: dict[str, Any], status: str) -> None:
        stage = self._stage(fields)
        stage.status = status
        stage.note = ""
        _update(stage, fields, "summary", "seconds")

    def _stage(self, fields: dict[str, Any]) -> Stage:
        name = fields["stage"]
        if name not in self._stages:  # one that only the plan could tell, at its place
            self._stages[name] = Stage(name=name)
            order = sorted(self._stages, key=lambda known: _PLACES.get(known, len(STAGES)))
            self._stages = {known: self._stages[known] for known in order}
        return self._stages[name]

    def _trial(self, fields: dict[str, Any]) -> Trial:
        name = fields["candidate_id"]
        return self._trials.setdefault(name, Trial(candidate_id=name))


def _update(target: Stage | Trial, fields: dict[str, Any], *names: str) -> None:
    for name in names:
        if fields.get(name) is not None:
            setattr(target, name, fields[name])
