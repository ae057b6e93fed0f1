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


class Heartbeat:
    """A listener that writes a line where stages and trials end, and now and then about progress."""

    def __init__(self, stream: TextIO, stages: Sequence[str] = STAGES) -> None:
        self._stream = stream
        self._model = ProgressModel(stages)
        self._lock = threading.Lock()
        self._spoke_at: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._model.apply(event)
            text = self._text(event)
            if text is None:
                return
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
            case "trial_finished":
                return _ended(self._model.trials[fields["candidate_id"]])
            case "note":
                return str(fields["text"])
            case "run_finished":
                return f"run {fields['status']} after {format_seconds(fields['seconds'])}"
        return None

    def _progress(self, event: Event) -> str | None:
        stage = self._model.stages[event.fields["stage"]]
        if event.at - self._spoke_at.get(stage.name, float("-inf")) < INTERVAL:
            return None
        self._spoke_at[stage.name] = event.at
        return f"{stage.name}: {', '.join(figures(stage, event.at))}"


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


def _ended(trial: Trial) -> str:
    name = trial.shape or trial.candidate_id
    if trial.status == "failed":
        return f"trial {name}: failed: {trial.reason or 'no reason given'}"
    loss = "no loss" if trial.val_loss is None else f"loss {trial.val_loss:.4f}"
    cut = "" if trial.cut_loss is None else f" (cut {trial.cut_loss:.4f})"
    return f"trial {name}: {trial.status} at {trial.tokens:,} tokens, {loss}{cut}"
