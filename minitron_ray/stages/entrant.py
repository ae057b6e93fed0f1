"""`Entrant`: one student of a baseline, how a worker trains it, and the rows that it leaves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from minitron_ray.distillation.loop import Share, Step
from minitron_ray.distillation.teacher import TeacherSignal
from minitron_ray.importance.controls import control_scores
from minitron_ray.importance.scores import Scores
from minitron_ray.plan import tokens_seen
from minitron_ray.results.schemas import TABLES
from minitron_ray.results.store import Store
from minitron_ray.search.baselines import Baseline
from minitron_ray.search.space import CandidateRow
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.trial import RungResult, retrain
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import initialized

_COLUMNS: Final = frozenset(TABLES["trials"].names)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """A shape, and the baseline that it is trained for."""

    origin: Baseline
    shape: CandidateRow

    @property
    def candidate_id(self) -> str:
        return self.shape.candidate.id

    @property
    def subject(self) -> str:
        """Its name in `sequence_losses` and in events."""
        return f"{self.origin}:{self.candidate_id}"

    @property
    def writer(self) -> str:
        """Of its fragments."""
        return f"baseline-{self.origin}-{self.candidate_id}"

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.origin} {self.shape.candidate.shape_text()}"

    def trial_row(self, rung: int, status: str, result: RungResult | None = None, **fields: Any) -> Row:
        """A row of `trials`, of what was measured at a rung where anything was."""
        measured = {} if result is None else asdict(result)
        row = {**self.shape.row(), "reason": None, "tokens": 0, **measured}
        row |= {"origin": self.origin, "rung": rung, "status": status, "final": status != "running"}
        return {name: value for name, value in (row | fields).items() if name in _COLUMNS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a worker needs to train an entrant and to write its rows. Picklable."""

    setting: Setting
    scores: Scores
    signal: Path | None
    """Folder of the teacher's stored signal; None runs the teacher beside each student."""
    store: Store

    @property
    def tokens(self) -> int:
        """That each entrant is trained on."""
        section = self.setting.experiment.searched.retrain
        return tokens_seen(section.tokens, section.batch, self.setting.experiment.data.sequence_length)

    def student(self, entrant: Entrant, share: Share) -> Headless:
        """As it begins: cut by importance, cut by the size of weights, or random."""
        setting, candidate = self.setting, entrant.shape.candidate
        seed = setting.experiment.seed
        if entrant.origin == "scratch":
            config = setting.student_config(candidate, self.scores)
            return Headless(initialized(config, seed=seed, device=share.device))
        scores = self.scores
        if entrant.origin == "magnitude":
            scores = control_scores(
                "magnitude", seed, setting.checkpoint, setting.family, setting.architecture
            )
        return setting.student(candidate, scores, share.device)

    def teacher(self, share: Share) -> TeacherSignal:
        """What the students learn from."""
        setting = self.setting
        return setting.stored_teacher(self.signal, share) if self.signal else setting.online_teacher(share)

    def write(self, entrant: Entrant, row: Row) -> None:
        """A row of `trials`; it replaces that of the same rung."""
        self.store.append("trials", [row], writer=entrant.writer, sequence=row["rung"])

    def write_losses(self, entrant: Entrant, rung: int, tokens: int, losses: dict[int, float]) -> None:
        """Rows of `sequence_losses`, from losses by validation sequence."""
        rows = [
            {"subject": entrant.subject, "phase": "baseline", "tokens": tokens, "sequence": key, "loss": loss}
            for key, loss in losses.items()
        ]
        self.store.append("sequence_losses", rows, writer=entrant.writer, sequence=rung)

    def clear(self, entrant: Entrant) -> None:
        """Drops the rows of an attempt that did not come to its end."""
        for table in ("trials", "sequence_losses"):
            self.store.remove(table, entrant.writer)

    def copy(self, entrant: Entrant, rows: list[Row], subject: str) -> None:
        """The rows of `trials` of an equal student that is trained already, and its sequences' losses
        under `subject`, as the entrant's own."""
        by_tokens: dict[int, dict[int, float]] = defaultdict(dict)
        for loss in self.store.read("sequence_losses").to_pylist():
            if loss["subject"] == subject and loss["phase"] in ("cut", "search", "baseline"):
                by_tokens[loss["tokens"]][loss["sequence"]] = loss["loss"]
        for row in sorted(rows, key=lambda row: row["rung"]):  # the last says that all is there
            if losses := by_tokens.get(row["tokens"]):
                self.write_losses(entrant, row["rung"], row["tokens"], losses)
            kept = {name: value for name, value in row.items() if name in _COLUMNS}
            self.write(entrant, kept | {"origin": entrant.origin, "cohort": None})


def score_cut(entrant: Entrant, bench: Bench, total: int, report: Callable[..., None]) -> None:
    """In a worker: the loss of an undistilled cut, as the only row of its trial so far."""
    setting = bench.setting
    share = setting.share()
    cut = setting.student(entrant.shape.candidate, bench.scores, share.device, trainable=False)
    loss = setting.measure(cut, share).loss
    bench.write(entrant, entrant.trial_row(0, "running", val_loss=loss))
    report("stage_progress", stage="baselines", done=1, total=total, unit="cuts")


def train_entrant(entrant: Entrant, bench: Bench, total: int, report: Callable[..., None]) -> None:
    """In a worker: train one student and write its rows. One that cannot be trained ends as failed."""
    bench.clear(entrant)
    name, results = entrant.subject, list[RungResult]()
    report("trial_started", candidate_id=name, shape=entrant.text, parameters=entrant.shape.parameters)
    reason = None
    try:
        _train(entrant, bench, total, report, results)
    except Exception as error:  # the other students, and the run, go on without it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        rung, last = (len(results) - 1, results[-1]) if results else (0, None)
        bench.write(entrant, entrant.trial_row(rung, "failed", last, reason=reason))
    report(
        "trial_finished",
        candidate_id=name,
        status="completed" if reason is None else "failed",
        val_loss=results[-1].val_loss if results else None,
        tokens=results[-1].tokens if results else 0,
        reason=reason,
        shape=entrant.text,
    )


def _train(
    entrant: Entrant, bench: Bench, total: int, report: Callable[..., None], results: list[RungResult]
) -> None:
    """Adds to `results` at every rung."""
    setting = bench.setting
    torch.manual_seed(setting.experiment.seed)
    share, first = setting.share(), setting.splits.validation.start

    def on_rung(result: RungResult) -> None:
        rung = len(results)
        results.append(result)
        bench.write_losses(entrant, rung, result.tokens, dict(enumerate(result.losses, first)))
        bench.write(entrant, entrant.trial_row(rung, "completed" if result.final else "running", result))
        report(
            "trial_progress",
            candidate_id=entrant.subject,
            tokens=result.tokens,
            total_tokens=bench.tokens,
            val_loss=result.val_loss,
        )

    def on_step(step: Step) -> None:
        report(
            "stage_progress",
            stage="baselines",
            done=step.tokens,
            total=total,
            unit="tokens",
            tokens_per_second=step.tokens_per_second,
            note=entrant.text,
        )

    student = bench.student(entrant, share)
    retrain(setting, student, bench.teacher(share), share, on_rung=on_rung, on_step=on_step)
