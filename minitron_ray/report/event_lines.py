"""`EventLines`: a run told in JSON, an event a line, for a program that shows it elsewhere."""

from __future__ import annotations

import threading
from typing import Any, TextIO

from minitron_ray.core.events import Event
from minitron_ray.results.events import line_of

INTERVAL = 1.0
"""Seconds between two lines about the progress of the same stage or trial."""


class EventLines:
    """A listener that writes what `results.events.event_of` reads. Progress in between is left out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._told_at: dict[tuple[str, Any], float] = {}

    def __call__(self, event: Event) -> None:
        with self._lock:
            if event.kind.endswith("_progress"):
                subject = (event.kind, event.fields.get("candidate_id", event.fields.get("stage")))
                if event.at - self._told_at.get(subject, float("-inf")) < INTERVAL:
                    return
                self._told_at[subject] = event.at
            try:
                self._stream.write(line_of(event))
                self._stream.flush()
            except BrokenPipeError:
                pass  # who listened went away; the run goes on
