"""One line a run, for `minitron-ray runs`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from minitron_ray.results.runs import RunInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`started` is UTC; `best_loss` the lowest validation loss of a student: distilled if one is, else
    after a trial, else as cut."""

    run_id: str
    experiment: str
    status: str
    started: datetime
    stages: tuple[str, ...]
    """Those that the run has."""
    stages_done: tuple[str, ...]
    best_loss: float | None
    rehearsal: bool

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {
            "started": self.started.isoformat(),
            "stages": list(self.stages),
            "stages_done": list(self.stages_done),
        }


def summarise(run: RunInfo) -> Line:
    """Reads what a run has written so far."""
    return Line(
        run_id=run.run_id,
        experiment=run.experiment,
        status=run.status,
        started=run.created,
        stages=run.stages,
        stages_done=run.stages_done,
        best_loss=None if run.rehearsal else _best_loss(run),
        rehearsal=run.rehearsal,
    )


def render(lines: Sequence[Line], console: Console) -> None:
    """A table; the name of an experiment folds where it must, figures never do."""
    day = "%Y-%m-%d %H:%M" if console.width >= 100 else "%Y-%m-%d\n%H:%M"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("run", no_wrap=True, overflow="fold")
    table.add_column("experiment", overflow="fold")
    for name in ("status", "started\n(UTC)"):
        table.add_column(name, no_wrap=True, overflow="fold")
    for name in ("stages\ndone", "best\nloss"):
        table.add_column(name, justify="right", no_wrap=True, overflow="fold")
    for line in lines:
        loss = "-" if line.best_loss is None else f"{line.best_loss:.4f}"
        done = f"{len(line.stages_done)}/{len(line.stages)}"
        name = f"{line.experiment} (rehearsal)" if line.rehearsal else line.experiment
        cells = (line.run_id, name, line.status, f"{line.started:{day}}", done, loss)
        table.add_row(*cells, style=_STYLES.get(line.status))
    console.print(table)


def _best_loss(run: RunInfo) -> float | None:
    if "search" in run.stages_waiting:
        return None  # trials stand at different rungs, and others are still to come
    rows = run.store.read("evaluations").to_pylist()
    by_phase = {
        phase: [row["value"] for row in rows if row["metric"] == "val_loss" and row["phase"] == phase]
        for phase in ("distilled", "cut")
    }
    rungs = [row for row in run.store.read("trials").to_pylist() if row["origin"] in (None, "search")]
    trials = [row["val_loss"] for row in rungs if row["final"]] or [row["val_loss"] for row in rungs]
    losses = by_phase["distilled"] or trials or by_phase["cut"]
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return min(known) if known else None


_STYLES = {"succeeded": "green", "failed": "red", "running": "cyan"}
