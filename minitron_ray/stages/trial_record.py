"""`Record`: what the search writes about its trials, and says to those who watch."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from minitron_ray.plan import Plan
from minitron_ray.results.schemas import TABLES
from minitron_ray.search.cohorts import Cohorts
from minitron_ray.search.halving import Fate
from minitron_ray.stages.choice import search_rows
from minitron_ray.stages.context import Context

_MEASURED: Final = ("tokens", "val_loss", "val_divergence", "train_loss", "seconds")


class Record:
    """Writes each rung as it is reported, and marks the last one when the trial has ended.

    The fragment's name is the candidate and the rung: a trial that is run again after a kill reports
    rungs that are there already, which are left as they are.
    """

    def __init__(
        self,
        context: Context,
        plan: Plan,
        cohorts: Cohorts,
        checkpoints: Path,
        keep_stopped: bool,
        show: Callable[[], None] = lambda: None,
    ) -> None:
        """`checkpoints` has a folder a candidate, removed when its trial ends; with `keep_stopped`, not
        that of one that halving stopped. `show` is called whenever a trial has ended."""
        self._context, self._plan, self._cohorts = context, plan, cohorts
        self._checkpoints, self._keep_stopped, self._show = checkpoints, keep_stopped, show
        self._shapes = {row.candidate.id: row.row() for row in plan.feasible}
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in search_rows(context.run.store):
            own = {name: value for name, value in row.items() if name not in ("experiment", "run_id")}
            self._rows[row["candidate_id"]].append(own)
        for rows in self._rows.values():
            rows.sort(key=lambda row: int(row["rung"]))

    def rung(self, candidate_id: str, result: dict[str, Any]) -> None:
        self._context.see_disk(self._checkpoints)  # the state at this rung is written
        self._context.events.emit(
            "trial_progress",
            candidate_id=candidate_id,
            tokens=result["tokens"],
            total_tokens=self._cohorts.rungs[-1],
            val_loss=result["val_loss"],
        )
        rows = self._rows[candidate_id]
        measured = [row for row in rows if row.get("val_loss") is not None]
        if any(row["tokens"] == result["tokens"] for row in measured):
            return
        for row in rows:
            if row["final"]:  # taken up again
                row |= {"final": False, "status": "running", "reason": None}
                self._write(row)
        rows[:] = measured
        row = {
            **self._row(candidate_id, len(rows)),
            **{name: result[name] for name in _MEASURED},
            "latency": result.get("latency"),
        }
        rows.append(row)
        self._write_losses(row, result["losses"])
        self._write(row)

    def ended(self, candidate_id: str, fate: Fate, reason: str | None) -> None:
        rows = self._rows[candidate_id]
        if not rows:
            rows.append({**self._row(candidate_id, 0), "tokens": 0})
        last = rows[-1]
        if fate.state == "stopped" and last["tokens"] > fate.tokens:
            return  # trained on by an earlier attempt, in the place of a trial that is tried again now
        told = {"final": True, "status": fate.state, "reason": reason or last.get("reason")}
        if last | told != last:
            last |= told
            self._write(last)
        if fate.state != "stopped" or not self._keep_stopped:
            shutil.rmtree(self._checkpoints / candidate_id, ignore_errors=True)
        self._context.events.emit(
            "trial_finished",
            candidate_id=candidate_id,
            status=fate.state,
            val_loss=last.get("val_loss"),
            tokens=last["tokens"],
            reason=last["reason"],
            shape=self._plan.candidate(candidate_id).shape_text(),
        )
        done = sum(fate.ended for fate in self._cohorts.fates.values())
        self._context.progress(done, self._plan.trials, "trials")
        self._show()

    def _row(self, candidate_id: str, rung: int) -> dict[str, Any]:
        shape = {
            name: value
            for name, value in self._shapes[candidate_id].items()
            if name in TABLES["trials"].names and name != "reason"
        }
        return {
            **shape,
            "rung": rung,
            "final": False,
            "status": "running",
            "reason": None,
            "cohort": self._cohorts.cohort_of[candidate_id],
            "origin": "search",
        }

    def _write_losses(self, row: dict[str, Any], losses: list[float]) -> None:
        """Before the row: a row that is there has its losses."""
        first = self._context.ready.setting.splits.validation.start
        written = [
            {
                "subject": row["candidate_id"],
                "phase": "search" if row["tokens"] else "cut",
                "tokens": row["tokens"],
                "sequence": first + number,
                "loss": loss,
            }
            for number, loss in enumerate(losses)
        ]
        writer = f"trial-{row['candidate_id']}"
        self._context.run.store.append("sequence_losses", written, writer=writer, sequence=row["rung"])

    def _write(self, row: dict[str, Any]) -> None:
        writer = f"trial-{row['candidate_id']}"
        self._context.run.store.append("trials", [row], writer=writer, sequence=row["rung"])
