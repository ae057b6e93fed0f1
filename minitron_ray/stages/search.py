"""Stage `search`: try candidates inside the budget, and keep those with the least loss after retraining."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from minitron_ray.core.errors import MinitronError
from minitron_ray.execution.tune_search import KnownTrial, SearchRequest, run_search
from minitron_ray.plan import Plan, tokens_seen
from minitron_ray.results.store import Store
from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.stages.context import Context
from minitron_ray.stages.importance import read_scores
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.trial import Objective, rung_steps

ENDED = ("completed", "stopped", "failed")


def run(context: Context, plan: Plan, setting: Setting, signal: str | None) -> tuple[dict[str, Any], str]:
    """Writes `trials` and `sequence_losses`; returns the chosen candidates, best first."""
    search, store = context.experiment.searched, context.run.store
    assert plan.band is not None
    batch_tokens = search.retrain.batch * context.experiment.data.sequence_length
    rungs = [step * batch_tokens for step in rung_steps(setting)]
    objective = Objective(
        setting=setting,
        scores=read_scores(context),
        candidates={row.candidate.id: row.candidate for row in plan.feasible},
        signal=Path(signal) if signal else None,
    )
    request = SearchRequest(
        objective=objective,
        proposals=ShapeProposals.of(list(plan.rows), search.space, plan.band, plan.teacher.hidden),
        sampler=search.sampler.build(context.experiment.seed),
        study=context.run.folder / "study.journal",
        trials=plan.trials,
        rungs=tuple(rungs),
        reduction=search.halving.reduction if search.halving else None,
        known=known_trials(store),
    )
    record = Record(context, plan)
    record.show_known(request.known)
    run_search(context.cluster, request, record)
    context.check_stop()
    return _choose(plan, store)


def known_trials(store: Store) -> tuple[KnownTrial, ...]:
    """What earlier attempts of this search left in the table `trials`."""
    rungs: dict[str, list[tuple[int, float]]] = defaultdict(list)
    ended: dict[str, bool] = defaultdict(bool)
    for row in store.read("trials").to_pylist():
        candidate_id = row["candidate_id"]
        if row["tokens"] and row["val_loss"] is not None:
            rungs[candidate_id].append((row["tokens"], row["val_loss"]))
        ended[candidate_id] |= row["status"] in ("completed", "stopped")  # a failed one is tried again
    return tuple(
        KnownTrial(candidate_id=key, rungs=tuple(sorted(rungs[key])), ended=value)
        for key, value in ended.items()
    )


def _choose(plan: Plan, store: Store) -> tuple[dict[str, Any], str]:
    rows = [row for row in store.read("trials").to_pylist() if row["final"]]
    completed = sorted(
        (r for r in rows if r["status"] == "completed"), key=lambda r: (r["val_loss"], r["candidate_id"])
    )
    if not completed:
        reasons = sorted({row["reason"] for row in rows if row["reason"]})
        why = "; ".join(reasons) or "all were stopped"
        raise MinitronError(f"none of {len(rows)} trials was completed: {why}; see logs/ in the run")
    keep = plan.experiment.searched.keep
    chosen = completed[:keep]
    best = chosen[0]
    counts = {status: sum(row["status"] == status for row in rows) for status in ENDED}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    shape = plan.candidate(best["candidate_id"]).shape_text()
    if len(chosen) < keep:
        told += f" (keep asks for {keep}; only completed trials can be kept)"
    summary = f"{told}; best {best['candidate_id']} ({shape}), loss {best['val_loss']:.3f}"
    return {"chosen": [row["candidate_id"] for row in chosen]}, summary


class Record:
    """Writes each rung as it is reported, and marks the last one when the trial has ended.

    The fragment's name is the candidate and the rung: a trial that is run again after a kill
    rewrites its rows instead of doubling them.
    """

    def __init__(self, context: Context, plan: Plan) -> None:
        self._context, self._plan = context, plan
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._done = 0

    def show_known(self, known: tuple[KnownTrial, ...]) -> None:
        """Tell the listeners about trials of earlier attempts."""
        for row in self._context.run.store.read("trials").to_pylist():
            if row["final"]:
                self._emit_end(
                    row["candidate_id"], row["status"], row["reason"], row["val_loss"], row["tokens"]
                )
        self._done = sum(trial.ended for trial in known)
        self._progress()

    def started(self, candidate_id: str) -> None:
        """Rows of a cut-off attempt are dropped: this one may end at an earlier rung."""
        self._rows[candidate_id].clear()
        for table in ("trials", "sequence_losses"):
            self._context.run.store.remove(table, f"trial-{candidate_id}")

    def rung(self, candidate_id: str, result: dict[str, Any]) -> None:
        rows = self._rows[candidate_id]
        row = {
            "candidate_id": candidate_id,
            "rung": len(rows),
            **{
                name: result[name]
                for name in ("tokens", "val_loss", "val_divergence", "train_loss", "seconds")
            },
            "final": False,
            "status": "running",
            **self._shape(candidate_id),
        }
        rows.append(row)
        experiment = self._plan.experiment
        retrain = experiment.searched.retrain
        store, phase = self._context.run.store, "search" if row["tokens"] else "cut"
        first = self._context.ready.setting.splits.validation.start
        losses = [
            {
                "subject": candidate_id,
                "phase": phase,
                "tokens": row["tokens"],
                "sequence": first + i,
                "loss": loss,
            }
            for i, loss in enumerate(result["losses"])
        ]
        store.append("sequence_losses", losses, writer=f"trial-{candidate_id}", sequence=row["rung"])
        self._write(row)
        self._context.events.emit(
            "trial_progress",
            candidate_id=candidate_id,
            tokens=row["tokens"],
            total_tokens=tokens_seen(retrain.tokens, retrain.batch, experiment.data.sequence_length),
            val_loss=row["val_loss"],
        )

    def ended(self, candidate_id: str, status: str, reason: str | None) -> None:
        rows = self._rows[candidate_id]
        if status == "interrupted":
            return  # its rows stay as "running"; the next attempt tries it first
        if not rows:
            rows.append({"candidate_id": candidate_id, "rung": 0, "tokens": 0, **self._shape(candidate_id)})
        last = {**rows[-1], "final": True, "status": status, "reason": reason}
        self._write(last)
        self._done += 1
        self._emit_end(candidate_id, status, reason, last.get("val_loss"), last["tokens"])
        self._progress()

    def _write(self, row: dict[str, Any]) -> None:
        writer = f"trial-{row['candidate_id']}"
        self._context.run.store.append("trials", [row], writer=writer, sequence=row["rung"])

    def _shape(self, candidate_id: str) -> dict[str, Any]:
        row = next(row for row in self._plan.rows if row.candidate.id == candidate_id).row()
        return {
            name: value for name, value in row.items() if name not in ("candidate_id", "in_budget", "reason")
        }

    def _emit_end(
        self, candidate_id: str, status: str, reason: str | None, loss: float | None, tokens: int
    ) -> None:
        self._context.events.emit(
            "trial_finished",
            candidate_id=candidate_id,
            status=status,
            val_loss=loss,
            tokens=tokens,
            reason=reason,
            shape=self._plan.candidate(candidate_id).shape_text(),
        )

    def _progress(self) -> None:
        self._context.progress(self._done, self._plan.trials, "trials")
