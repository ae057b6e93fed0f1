"""What a stage may touch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_ray.core.errors import Interrupted
from minitron_ray.core.events import EventBus
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment
from minitron_ray.results.cache import Cache
from minitron_ray.results.files import folder_size
from minitron_ray.results.run import Run
from minitron_ray.stages.prepare import Prepared
from minitron_ray.stages.reuse import take_over, usable, withdraw


@dataclass(kw_only=True)
class Context:
    """One run in progress: its file, its folder, its cluster, and who listens."""

    experiment: Experiment
    ready: Prepared
    run: Run
    cache: Cache
    cluster: Cluster
    events: EventBus
    stop: StopSignal
    current: str = ""
    """The stage in progress."""
    before_work: Callable[[], None] = lambda: None
    """Called before a stage is made and not found. Raises where it must not be made here."""
    tokens: int | None = None
    """That it has put through a network in this attempt, where it says so."""
    disk: int | None = None
    """Most bytes that this attempt took of the disk at a time, of what the report tells."""

    def check_stop(self) -> None:
        """Raises Interrupted if the user asked to stop."""
        self.stop.check()

    def stage(
        self,
        name: str,
        fingerprint: str,
        work: Callable[[], tuple[dict[str, Any], str]],
        total: int | None = None,
        unit: str = "",
        students: Collection[str] | None = None,
        again: Callable[[], tuple[dict[str, Any], str]] | None = None,
    ) -> dict[str, Any]:
        """The stage's output: recorded by an earlier attempt, or made now by `work`.

        `work` returns the output (JSON values) and a one-line summary; it is recorded last, so a
        killed stage is not done. A record of other `students` than these does not count, nor does one
        of which a trial failed: that is tried again. `again` makes output and summary from the rows
        that another run has left, where they depend on more than the fingerprint.
        """
        self.check_stop()
        record = self.run.record(name, fingerprint)
        if record is not None and usable(self.run.store, record, students):
            return self._reused(name, fingerprint, record)
        if record is not None:
            withdraw(self.run, record)
        if (record := take_over(self.run, name, fingerprint, students)) is not None:
            if again is not None:
                record["output"], record["summary"] = again()
            return self._taken_over(name, fingerprint, record)
        self.before_work()
        with self._recording(name, fingerprint, total, unit) as started:
            output, summary = work()
            seconds = time.monotonic() - started
            self.run.finish_stage(
                name, fingerprint, output, summary, seconds, tokens=self.tokens, disk=self.disk
            )
        self.events.emit("stage_finished", stage=name, summary=summary, seconds=seconds)
        return output

    def _taken_over(self, name: str, fingerprint: str, record: dict[str, Any]) -> dict[str, Any]:
        output: dict[str, Any] = record["output"]
        summary, seconds = record["summary"], record["seconds"]
        self.run.finish_stage(name, fingerprint, output, summary, seconds, taken_over=True)
        self.events.emit("stage_reused", stage=name, summary=f"{summary} (from another run)")
        return output

    def _reused(self, name: str, fingerprint: str, record: dict[str, Any]) -> dict[str, Any]:
        summary = record["summary"]
        self.run.note_stage(name, fingerprint, "reused", summary, 0.0)
        self.events.emit("stage_reused", stage=name, summary=summary)
        output: dict[str, Any] = record["output"]
        return output

    @contextmanager
    def _recording(self, name: str, fingerprint: str, total: int | None, unit: str) -> Iterator[float]:
        self.current, self.tokens, self.disk = name, None, None
        self.run.begin_stage(name, fingerprint)
        self.events.emit("stage_started", stage=name, total=total, unit=unit)
        started = time.monotonic()
        try:
            yield started
        except (Interrupted, KeyboardInterrupt):
            self._ended(name, fingerprint, "interrupted", "stopped by request", started)
            raise
        except Exception as error:
            summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self._ended(name, fingerprint, "failed", summary, started)
            self.events.emit("stage_failed", stage=name, error=summary)
            raise

    def _ended(self, name: str, fingerprint: str, status: str, summary: str, started: float) -> None:
        seconds = time.monotonic() - started
        self.run.note_stage(name, fingerprint, status, summary, seconds, tokens=self.tokens, disk=self.disk)

    def see_disk(self, folder: Path) -> None:
        """Keeps the size of a folder that the stage will remove, where it is the largest seen."""
        if folder.is_dir():
            self.disk = max(self.disk or 0, folder_size(folder))

    def progress(self, done: int, total: int, unit: str) -> None:
        """How far the current stage is."""
        self.events.emit("stage_progress", stage=self.current, done=done, total=total, unit=unit)
