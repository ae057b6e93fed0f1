"""What a stage may touch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from minitron_ray.core.errors import Interrupted
from minitron_ray.core.events import EventBus
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment
from minitron_ray.results.cache import Cache
from minitron_ray.results.run import Run
from minitron_ray.stages.prepare import Prepared
from minitron_ray.stages.reuse import outputs_exist, take_over


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
    ) -> dict[str, Any]:
        """The stage's output: recorded by an earlier attempt, or made now by `work`.

        `work` returns the output (JSON values) and a one-line summary; it is recorded last, so a
        killed stage is not done.
        """
        self.check_stop()
        record = self.run.record(name, fingerprint)
        if record is not None and outputs_exist(self.run.folder, record["output"]):
            return self._reused(name, fingerprint, record, record["summary"])
        if (record := take_over(self.run, name, fingerprint)) is not None:
            self.run.finish_stage(name, fingerprint, record["output"], record["summary"], record["seconds"])
            return self._reused(name, fingerprint, record, f"{record['summary']} (from another run)")
        with self._recording(name, fingerprint, total, unit) as started:
            output, summary = work()
            seconds = time.monotonic() - started
            self.run.finish_stage(name, fingerprint, output, summary, seconds)
        self.events.emit("stage_finished", stage=name, summary=summary, seconds=seconds)
        return output

    def _reused(self, name: str, fingerprint: str, record: dict[str, Any], summary: str) -> dict[str, Any]:
        self.run.note_stage(name, fingerprint, "reused", summary, 0.0)
        self.events.emit("stage_reused", stage=name, summary=summary)
        output: dict[str, Any] = record["output"]
        return output

    @contextmanager
    def _recording(self, name: str, fingerprint: str, total: int | None, unit: str) -> Iterator[float]:
        self.current = name
        self.events.emit("stage_started", stage=name, total=total, unit=unit)
        started = time.monotonic()
        try:
            yield started
        except (Interrupted, KeyboardInterrupt):
            self.run.note_stage(
                name, fingerprint, "interrupted", "stopped by request", time.monotonic() - started
            )
            raise
        except Exception as error:
            summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.run.note_stage(name, fingerprint, "failed", summary, time.monotonic() - started)
            self.events.emit("stage_failed", stage=name, error=summary)
            raise

    def progress(self, done: int, total: int, unit: str) -> None:
        """How far the current stage is."""
        self.events.emit("stage_progress", stage=self.current, done=done, total=total, unit=unit)
