"""`show`: a run that another process drives, shown here as if it were ours.

What comes in is what that process says: events, and lines of other text (the ranking at the end, an
error). Several runs may follow one another, as they do when one command names several experiments.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Final, TextIO

from minitron_ray.core.events import Event
from minitron_ray.report.live import open_view
from minitron_ray.results.events import EventFile, event_of
from minitron_ray.results.runs import RunInfo, read_info

DETACHES: Final = "Ctrl-C detaches; the run goes on"
_KEPT = 200
"""Lines of other text kept while a picture stands where they would go."""
_POLL_S = 0.5
_OF_RAY = ("INFO job_manager.py:", "Running entrypoint for job ")
"""In lines that Ray writes about a job before it begins."""


def show(
    said: Iterable[Event | str],
    *,
    stages: Sequence[str],
    quiet: bool = False,
    out: TextIO | None = None,
    err: TextIO | None = None,
) -> str | None:
    """Shows events on `err` until there are no more; text goes to `out` after a run, to `err` amid one.

    Returns the status of the last `run_finished`: `succeeded`, `failed`, `interrupted`; None without one.
    """
    out, err = out or sys.stdout, err or sys.stderr
    status: str | None = None
    amid: deque[str] = deque(maxlen=_KEPT)
    with ExitStack() as stack:
        view: Callable[[Event], None] | None = None
        for item in said:
            if isinstance(item, str):
                if view is None and status == "succeeded":
                    out.write(item + "\n")
                    out.flush()
                else:
                    amid.append(item)
                continue
            if view is None:
                view = stack.enter_context(open_view(err, quiet=quiet, stages=stages, hint=DETACHES))
                status = None
            view(item)
            if item.kind == "run_finished":
                status, view = item.fields["status"], None
                stack.close()
                if status == "succeeded":
                    amid.clear()
    if status != "succeeded":
        err.writelines(line + "\n" for line in amid)
        err.flush()
    return status


def events_and_text(lines: Iterable[str]) -> Iterator[Event | str]:
    """The lines of a job: those that are events as events, the others as they are."""
    for line in lines:
        if (event := event_of(line)) is not None:
            yield event
        elif not any(mark in line for mark in _OF_RAY):
            yield line


def run_events(info: RunInfo, wait: Callable[[float], None]) -> Iterator[Event]:
    """The events of the newest attempt at a run, and those to come, until it ends or its driver is gone.

    `wait` is called with the seconds to the next look.
    """
    file = EventFile(info.folder)
    while True:
        # Asked before the reading: what a driver wrote before it ended is then not missed.
        driven = read_info(info.folder).status in ("created", "running")
        ended = False
        for event in file.read():
            ended = event.kind == "run_finished"
            yield event
        if ended or not driven:
            return
        wait(_POLL_S)
