"""`Heartbeat`: a run told in plain lines, for pipes, log files and terminals that can't redraw."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TextIO

from minitron_ray.core.events import Event
from minitron_ray.core.units import format_count, format_seconds
from minitron_ray.report.progress import ProgressModel, Stage, Trial
from minitron_ray.results.runs import STAGES

INTERVAL = 30.0
"""Seconds between two lines about the same stage's progress."""
SILENCE = 60.0
"""Seconds without a line after which the trials at work are told of."""
_TOLD = 3
"""Trials in such a line at most."""


class Heartbeat:
    """A listener that writes a line where stages and trials end, and now and then about progress."""

    def __init__(self, stream: TextIO, stages: Sequence[str] = STAGES) -> None:
        self._stream = stream
        self._model = ProgressModel(stages)
        self._lock = threading.Lock()
        self._spoke_at: dict[str, float] = {}
        self._wrote_at: float | None = None
        self._moved: dict[str, None] = {}
        """Trials that got on since they were last told of."""

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._model.apply(event)
            if self._wrote_at is None:
                self._wrote_at = event.at
            text = self._text(event)
            if text is None:
                return
            self._wrote_at = event.at
            minutes, seconds = divmod(int(self._model.elapsed(event.at)), 60)
            at = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
            try:
                self._stream.write(f"[{at}] {' '.join(text.split())}\n")
                self._stream.flush()
            except BrokenPipeError:
                pass  # who listened went away; the run goes on

    def _text(self, event: Event) -> str | None:
        fields = event.fields
        match event.kind:
            case "run_started":
                return f"run {fields['run_id']} of {fields['experiment']} in {fields.get('folder', '')}"
            case "stage_started":
                self._spoke_at[fields["stage"]] = event.at
                return f"{fields['stage']}: started{_work(self._model.stages[fields['stage']])}"
            case "stage_progress":
                return self._progress(event)
            case "stage_reused":
                return f"{fields['stage']}: reused, {fields.get('summary', '')}"
            case "stage_finished":
                took = format_seconds(fields["seconds"])
                return f"{fields['stage']}: finished in {took}, {fields.get('summary', '')}"
            case "stage_failed":
                return f"{fields['stage']}: failed: {fields['error']}"
            case "trial_progress":
                return self._trials(event)
            case "trial_finished":
                return _ended(self._model.trials[fields["candidate_id"]])
            case "note":
                return str(fields["text"])
            case "run_finished":
                return f"run {fields['status']} after {format_seconds(fields['seconds'])}"
        return None

    def _progress(self, event: Event) -> str | None:
        stage = self._model.stages[event.fields["stage"]]
        if stage.status != "running":
            return None  # a worker's word that comes after the stage's end
        if event.at - self._spoke_at.get(stage.name, float("-inf")) < INTERVAL:
            return None
        self._spoke_at[stage.name] = event.at
        return f"{stage.name}: {', '.join(figures(stage, event.at))}"

    def _trials(self, event: Event) -> str | None:
        """Between two rungs nothing else is said of a trial, and that may be long."""
        self._moved[event.fields["candidate_id"]] = None
        stage, known = self._model.running_stage(), self._model.trials
        at_work = [known[name] for name in self._moved if known[name].status == "running"]
        assert self._wrote_at is not None
        if stage is None or not at_work or event.at - self._wrote_at < SILENCE:
            return None
        self._moved.clear()
        more = [f"and {len(at_work) - _TOLD} more"] if len(at_work) > _TOLD else []
        return f"{stage.name}: {'; '.join([*map(_at_work, at_work[:_TOLD]), *more])}"


def figures(stage: Stage, now: float) -> list[str]:
    """What is known about a running stage: amount done, loss, speed, time to go, a note."""
    parts = [amount(stage)]
    if stage.loss is not None:
        parts.append(f"loss {stage.loss:.4f}")
    if stage.tokens_per_second is not None:
        parts.append(f"{format_count(stage.tokens_per_second)} tokens/s")
    remaining = stage.remaining(now)
    if remaining is not None:
        parts.append(f"{format_seconds(remaining)} to go")
    return [part for part in (*parts, stage.note) if part]


def amount(stage: Stage) -> str:
    """`8,192 of 65,536 tokens`, or how many so far where the total is unknown."""
    if stage.total is not None:
        return f"{stage.done:,.0f} of {stage.total:,.0f} {stage.unit}".rstrip()
    return f"{stage.done:,.0f} {stage.unit}".rstrip() if stage.done else ""


def _work(stage: Stage) -> str:
    return f", {stage.total:,.0f} {stage.unit}" if stage.total is not None else ""


def _at_work(trial: Trial) -> str:
    of = f" of {trial.total_tokens:,}" if trial.total_tokens is not None else ""
    parts = [f"{trial.shape or trial.candidate_id} at {trial.tokens:,}{of} tokens"]
    if trial.train_loss is not None:
        parts.append(f"loss {trial.train_loss:.4f}")
    if trial.tokens_per_second is not None:
        parts.append(f"{format_count(trial.tokens_per_second)} tokens/s")
    return ", ".join(parts)


def _ended(trial: Trial) -> str:
    name = trial.shape or trial.candidate_id
    if trial.status == "failed":
        return f"trial {name}: failed: {trial.reason or 'no reason given'}"
    loss = "no loss" if trial.val_loss is None else f"loss {trial.val_loss:.4f}"
    cut = "" if trial.cut_loss is None else f" (cut {trial.cut_loss:.4f})"
    return f"trial {name}: {trial.status} at {trial.tokens:,} tokens, {loss}{cut}"
