"""`Run`: the folder of one run, which is all that a run leaves behind.

results/<experiment>/<run id>/
  run.json  experiment.yaml (as given)  resolved.yaml  environment.json  events.jsonl
  stages/<stage>.json  tables/  checkpoints/  exports/  logs/
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

from filelock import FileLock, Timeout

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.events import Event
from minitron_ray.core.yaml import dumped
from minitron_ray.results.events import line_of
from minitron_ray.results.files import cannot_write, make_folder, write_file, write_json
from minitron_ray.results.runs import STAGES, RunInfo, find_runs, read_info, resolve_run
from minitron_ray.results.schemas import TABLES
from minitron_ray.results.store import Store

STATUSES: Final = ("created", "running", "interrupted", "failed", "succeeded")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Run:
    """A run being driven by this process. Readers use `RunInfo` (`results/runs.py`) and `Store`."""

    def __init__(self, folder: Path) -> None:
        info = read_info(folder)
        self.folder = folder
        self.experiment = info.experiment
        self.run_id = info.run_id
        self.rehearsal = info.rehearsal
        self.store = Store(folder, info.experiment, info.run_id)
        self._writing = threading.Lock()
        self._events_mended = False
        self._begun: dict[str, int] = {}

    @classmethod
    def open(
        cls,
        results: Path,
        experiment: str,
        fingerprint: str,
        source: bytes,
        resolved: dict[str, Any],
        environment: dict[str, Any],
        stages: Sequence[str] = STAGES,
        rehearsal: bool = False,
    ) -> Self:
        """The newest run of that experiment with that fingerprint, to go on with; a new one if there is none.

        `resolved` is the whole experiment as JSON values, `stages` those that it has. Raises
        EnvironmentFailure where the results folder can't be written, ValueError for a name that can't
        be a folder.
        """
        if not _NAME.fullmatch(experiment):
            raise ValueError(f"{experiment!r} cannot name an experiment folder")
        home = make_folder(Path(results) / experiment)
        with FileLock(home / ".lock"):
            same = [info for info in find_runs(results) if info.experiment == experiment]
            same = [info for info in same if (info.fingerprint, info.rehearsal) == (fingerprint, rehearsal)]
            if same:
                return cls(same[-1].folder)
            made = _create(home, experiment, fingerprint, source, resolved, environment, stages, rehearsal)
            return cls(made)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while this process drives the run. Raises ConfigError if another process does."""
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"run {self.run_id} is already being driven by process {self._driver()}; "
                "wait for it to end, or stop it with Ctrl-C in its terminal"
            ) from None
        try:
            write_json(self.folder / "driver.json", {"process": os.getpid(), "host": socket.gethostname()})
            yield
        finally:
            lock.release()

    @property
    def status(self) -> str:
        """One of STATUSES, as last set."""
        return str(self._manifest()["status"])

    def set_status(
        self, status: str, *, teacher_digest: str | None = None, data_digest: str | None = None
    ) -> None:
        """Records the status in run.json and as a row of `runs`; a digest once given is kept."""
        if status not in STATUSES:
            raise ValueError(f"unknown status {status!r}; one of {', '.join(STATUSES)}")
        with self._writing:
            manifest = self._manifest()
            manifest["status"] = status
            manifest["updated"] = datetime.now(UTC).isoformat()
            manifest["changes"] += 1
            manifest["teacher_digest"] = teacher_digest or manifest["teacher_digest"]
            manifest["data_digest"] = data_digest or manifest["data_digest"]
            row = {name: value for name, value in manifest.items() if name in TABLES["runs"].names}
            row["at"] = datetime.now(UTC)
            # The row first: killed in between, the same row is written again under the same name.
            self.store.append("runs", [row], writer="driver", sequence=manifest["changes"])
            write_json(self.folder / "run.json", manifest)

    def record(self, stage: str, fingerprint: str) -> dict[str, Any] | None:
        """What `finish_stage` recorded, if it was for the same fingerprint: keys output, summary, seconds."""
        path = self.folder / "stages" / f"{stage}.json"
        if not path.is_file():
            return None
        record: dict[str, Any] = json.loads(path.read_bytes())
        return record if record["fingerprint"] == fingerprint else None

    def begin_stage(self, stage: str, fingerprint: str) -> None:
        """Adds a row to `stages` for an attempt in progress, which that of its end replaces: of one that is
        killed it stays."""
        row = _stage_row(stage, fingerprint, "running", "", None)
        with self._writing:
            self._begun[stage] = self._next_attempt(stage)
            self.store.append("stages", [row], writer=f"attempt-{stage}", sequence=self._begun[stage])

    def finish_stage(
        self,
        stage: str,
        fingerprint: str,
        output: dict[str, Any],
        summary: str,
        seconds: float,
        *,
        tokens: int | None = None,
        disk: int | None = None,
        taken_over: bool = False,
    ) -> None:
        """Records that a stage is done; call it after everything else of the stage is written.

        `tokens` are those that this attempt put through a network, `disk` the most bytes of its files. What is
        `taken_over` from another run took its `seconds` there.
        """
        status, spent = ("taken_over", 0.0) if taken_over else ("finished", seconds)
        row = _stage_row(stage, fingerprint, status, summary, spent, tokens, disk)
        with self._writing:
            begun = self._begun.pop(stage, None)
            writer = f"finished-{stage}" if begun is None else f"attempt-{stage}"
            self.store.append("stages", [row], writer=writer, sequence=begun or 0)
        record = {"stage": stage, "fingerprint": fingerprint, "summary": summary, "seconds": seconds}
        make_folder(self.folder / "stages")
        write_json(self.folder / "stages" / f"{stage}.json", record | {"output": output})

    def drop_stage(self, stage: str) -> None:
        """The stage is no longer done; its rows stay."""
        (self.folder / "stages" / f"{stage}.json").unlink(missing_ok=True)

    def note_stage(
        self,
        stage: str,
        fingerprint: str,
        status: str,
        summary: str,
        seconds: float,
        *,
        tokens: int | None = None,
        disk: int | None = None,
    ) -> None:
        """Adds a row to `stages` for an attempt that was reused, failed or interrupted."""
        row = _stage_row(stage, fingerprint, status, summary, seconds, tokens, disk)
        with self._writing:
            begun = self._begun.pop(stage, None)
            sequence = self._next_attempt(stage) if begun is None else begun
            self.store.append("stages", [row], writer=f"attempt-{stage}", sequence=sequence)

    def _next_attempt(self, stage: str) -> int:
        sequence = 0
        while self.store.has("stages", f"attempt-{stage}", sequence):
            sequence += 1
        return sequence

    def log_event(self, event: Event) -> None:
        """Appends one line to events.jsonl; a listener for `core.events.EventBus`, from any thread."""
        line = line_of(event)
        path = self.folder / "events.jsonl"
        with self._writing:
            try:
                with path.open("ab") as stream:
                    if not self._events_mended and _torn(path):
                        stream.write(b"\n")
                    self._events_mended = True
                    stream.write(line.encode())
            except OSError as error:
                raise cannot_write(path, error) from error

    def _manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.folder / "run.json").read_bytes())
        return manifest

    def _driver(self) -> str:
        try:
            driver = json.loads((self.folder / "driver.json").read_bytes())
        except (OSError, ValueError):
            return "of unknown number"
        here = driver["host"] == socket.gethostname()
        return str(driver["process"]) if here else f"{driver['process']} on {driver['host']}"


def _create(
    home: Path,
    experiment: str,
    fingerprint: str,
    source: bytes,
    resolved: dict[str, Any],
    environment: dict[str, Any],
    stages: Sequence[str],
    rehearsal: bool,
) -> Path:
    """A run folder, run.json written last: without it a folder is no run."""
    created = datetime.now(UTC)
    while (folder := home / f"{created:%Y%m%dt%H%M%S}-{fingerprint[:6]}").exists():
        created += timedelta(seconds=1)
    for name in ("tables", "checkpoints", "exports", "logs", "stages"):
        make_folder(folder / name)
    write_file(folder / "experiment.yaml", source)
    write_file(folder / "resolved.yaml", dumped(resolved))
    write_json(folder / "environment.json", environment)
    write_file(folder / "events.jsonl", b"")
    manifest = {
        "experiment": experiment,
        "run_id": folder.name,
        "fingerprint": fingerprint,
        "stages": list(stages),
        "rehearsal": rehearsal,
        "status": "created",
        "created": created.isoformat(),
        "updated": created.isoformat(),
        "changes": 0,
        "teacher": (resolved.get("teacher") or {}).get("path"),
        "teacher_digest": None,
        "data_digest": None,
        "seed": resolved.get("seed"),
        "versions": json.dumps(environment.get("versions", environment), sort_keys=True),
    }
    write_json(folder / "run.json", manifest)
    return folder


def _stage_row(
    stage: str,
    fingerprint: str,
    status: str,
    summary: str,
    seconds: float | None,
    tokens: int | None = None,
    disk: int | None = None,
) -> dict[str, Any]:
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; one of {', '.join(STAGES)}")
    row = {"stage": stage, "fingerprint": fingerprint, "status": status, "summary": summary}
    return row | {"seconds": seconds, "at": datetime.now(UTC), "tokens": tokens, "disk_bytes": disk}


def _torn(path: Path) -> bool:
    """Whether the last line of a file was cut by a kill."""
    with path.open("rb") as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return False
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"


__all__ = ["STAGES", "STATUSES", "Run", "RunInfo", "find_runs", "resolve_run"]
