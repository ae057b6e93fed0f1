"""`Event`: one thing that happened in a run, as plain data, and `EventBus`, which hands it on.

The stages say what happens; the terminal, the heartbeat lines and `events.jsonl` are three
listeners. An event's `kind` is one of `KINDS`; its fields are JSON values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

KINDS: Final = {
    "run_started": "experiment, run_id, folder",
    "stage_started": "stage, total (units of work, or null), unit ('tokens', 'trials', 'sequences')",
    "stage_progress": "stage, done, total, unit, and any of loss, tokens_per_second, step, note",
    "stage_reused": "stage, summary",
    "stage_finished": "stage, summary, seconds",
    "stage_failed": "stage, error",
    "trial_started": "candidate_id, shape (text), parameters",
    "trial_progress": "candidate_id, tokens, total_tokens, val_loss or train_loss, tokens_per_second",
    "trial_finished": "candidate_id, status ('completed', 'stopped', 'failed'), val_loss, tokens, reason",
    "note": "text",
    "run_finished": "status, seconds",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`kind` is a key of `KINDS`, `at` is Unix time in seconds."""

    kind: str
    fields: dict[str, Any]
    at: float = field(default_factory=time.time)


class EventBus:
    """Hands every event to every listener, in the calling thread."""

    def __init__(self, *listeners: Callable[[Event], None]) -> None:
        self._listeners = list(listeners)

    def add(self, listener: Callable[[Event], None]) -> None:
        self._listeners.append(listener)

    def emit(self, kind: str, **fields: Any) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown event kind {kind!r}; one of {', '.join(KINDS)}")
        event = Event(kind=kind, fields=fields)
        for listener in self._listeners:
            listener(event)
