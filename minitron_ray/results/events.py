"""Events as lines of JSON: `line_of`, `event_of`, and `EventFile`, which reads a run's as they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_ray.core.events import KINDS, Event
from minitron_ray.results.files import finite


def line_of(event: Event) -> str:
    """One line with its end: `{"at": ..., "kind": ..., <fields>}`."""
    return json.dumps(finite({"at": event.at, "kind": event.kind, **event.fields}), default=str) + "\n"


def event_of(line: str) -> Event | None:
    """The event that `line_of` wrote; None for any other text, and for a line that a kill cut."""
    if not line.startswith('{"at": '):
        return None
    try:
        fields: dict[str, Any] = json.loads(line)
        at, kind = float(fields.pop("at")), fields.pop("kind")
    except (ValueError, KeyError, TypeError):
        return None
    return Event(kind=kind, fields=fields, at=at) if kind in KINDS else None


class EventFile:
    """The events of one run folder, read on from where the last reading ended."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "events.jsonl"
        self._offset = 0
        self._rest = b""

    def read(self) -> list[Event]:
        """The events since the last call; at the first call those of the newest attempt."""
        first = self._offset == 0
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                written = stream.read()
        except FileNotFoundError:
            return []
        self._offset += len(written)
        *lines, self._rest = (self._rest + written).split(b"\n")
        found = [event_of(line.decode(errors="replace")) for line in lines]
        events = [event for event in found if event is not None]
        return _newest_attempt(events) if first else events


def _newest_attempt(events: list[Event]) -> list[Event]:
    """What a driver says before it opens its run stands in no file, so an attempt begins with its run."""
    begins = [index for index, event in enumerate(events) if event.kind == "run_started"]
    return events[begins[-1] :] if begins else events
