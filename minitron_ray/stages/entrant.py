"""`Entrant`: one student of a baseline, how a worker trains it, and the rows that it leaves."""

from __future__ import annotations

import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from minitron_ray.distillation.loop import Share, Step
from minitron_ray.distillation.teacher import TeacherSignal
from minitron_ray.execution.cluster import GroupSize
from minitron_ray.execution.failures import first_line, left_off, of_the_machine
from minitron_ray.execution.train_group import Worker, run_group_in_trial
from minitron_ray.importance.controls import control_scores
from minitron_ray.importance.scores import Scores
from minitron_ray.plan import tokens_seen
from minitron_ray.results.files import folder_size
from minitron_ray.results.schemas import TABLES
from minitron_ray.results.store import Store
from minitron_ray.search.baselines import Baseline
from minitron_ray.search.space import CandidateRow
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.trial import RungResult, retrain, told_of_memory
from minitron_ray.stages.trial_state import FileState, ShardedState, TrialState
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
    states: Path
    """Holds a folder an entrant in training, with the state that it goes on from; every node must see it."""
    group: GroupSize | None = None
    """The processes that share a student, as those of a search trial do; None where one trains it."""

    @property
    def tokens(self) -> int:
        """That each entrant is trained on."""
        section = self.setting.experiment.searched.retrain
        return tokens_seen(section.tokens, section.batch, self.setting.experiment.data.sequence_length)

    def student(self, entrant: Entrant, share: Share) -> Headless:
        """As it begins: cut by importance, cut by the size of weights, or random. Of a group each rank
        gets its shard."""
        setting, candidate = self.setting, entrant.shape.candidate
        seed, section = setting.experiment.seed, setting.experiment.searched.retrain
        if entrant.origin == "scratch":
            config = setting.student_config(candidate, self.scores)
            if self.group is None:
                student = setting.headless(initialized(config, seed=seed, device=share.device))
                setting.lift(student, section, candidate, None)
                return student
            student = setting.headless(initialized(config, seed=seed))
            setting.lift(student, section, candidate, None)
            layers = student.model.get_submodule(setting.family.decoder_layers)
            setting.sharding(share, trial=True).whole(student, layers.children())
            return student
        scores = self.scores
        if entrant.origin == "magnitude":
            scores = control_scores(
                "magnitude", seed, setting.checkpoint, setting.family, setting.architecture
            )
        if self.group is not None:
            return setting.sharded_student(candidate, scores, share, section)
        student = setting.student(candidate, scores, share.device)
        setting.lift(student, section, candidate, scores)
        return student

    def teacher(self, share: Share) -> TeacherSignal:
        """What the students learn from."""
        setting = self.setting
        return setting.stored_teacher(self.signal, share) if self.signal else setting.online_teacher(share)

    def state(self, entrant: Entrant, share: Share) -> TrialState:
        """What an entrant's training goes on from after a kill."""
        folder = self.folder(entrant)
        if self.group is None:
            return FileState(folder / "rung.pt")
        return ShardedState(folder, share.rank, share.device)

    def folder(self, entrant: Entrant) -> Path:
        """Of its state."""
        return self.states / entrant.writer

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

    def rows(self, entrant: Entrant) -> list[Row]:
        """Its rows of `trials`, by their rung."""
        rows = [
            row
            for writer, _, fragment in self.store.fragments("trials", entrant.writer)
            for row in fragment
            if writer == entrant.writer
        ]
        return sorted(rows, key=lambda row: int(row["rung"]))

    def clear(self, entrant: Entrant) -> None:
        """Drops the rows of an attempt that did not come to its end. Those of the rungs that its state holds
        are written again."""
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
            self.write(entrant, kept | {"origin": entrant.origin, "cohort": None, "copied": True})


def train_entrant(entrant: Entrant, bench: Bench, total: int, report: Any) -> int:
    """In a worker: train one student and write its rows, from the state of an attempt that was ended. One that
    cannot be trained ends as failed. The bytes that its state took, which is as large at every rung.

    On a stop, by `report`, it keeps its state. Raises EnvironmentFailure where the machine can't go on with it,
    which says nothing of the student: its state stays, too.
    """
    before = bench.rows(entrant)[:1]  # of `largest_first` what chose it: the loss of its cut
    bench.clear(entrant)
    name = entrant.subject
    report("trial_started", candidate_id=name, shape=entrant.text, parameters=entrant.shape.parameters)
    reason = None
    try:
        with told_of_memory(bench.setting, entrant.text, bench.group):
            if not _to_its_end(entrant, bench, total, report):
                return folder_size(bench.folder(entrant))
    except Exception as error:  # the other students, and the run, go on without it
        if of_the_machine(error):
            raise left_off(entrant.text, first_line(error)) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        *_, last = [entrant.trial_row(0, "failed"), *before, *bench.rows(entrant)]
        bench.write(entrant, last | {"status": "failed", "final": True, "reason": reason})
    size = folder_size(bench.folder(entrant))
    shutil.rmtree(bench.folder(entrant), ignore_errors=True)
    row = bench.rows(entrant)[-1]
    report(
        "trial_finished",
        candidate_id=name,
        status=row["status"],
        val_loss=row["val_loss"],
        tokens=row["tokens"],
        reason=reason,
        shape=entrant.text,
    )
    return size


def _to_its_end(entrant: Entrant, bench: Bench, total: int, report: Any) -> bool:
    """Whether it came there, or was stopped before."""
    if bench.group is None:
        return _train(entrant, bench, total, bench.setting.share(), report, report.stop_requested)
    while not run_group_in_trial(bench.group, train_in_group, (entrant, bench, total), report):
        if report.stop_requested():
            return False  # else one of its workers was told to end, and another group goes on
    return True


def train_in_group(job: tuple[Entrant, Bench, int], worker: Worker) -> bool:
    """On every rank: train the student that they share, to its end or a stop. Rank 0 writes the rows."""
    entrant, bench, total = job
    share = bench.setting.share(worker.rank, worker.world, worker.device)
    return _train(entrant, bench, total, share, worker.report, worker.stop_requested)


def _train(
    entrant: Entrant,
    bench: Bench,
    total: int,
    share: Share,
    report: Callable[..., None],
    stop: Callable[[], bool],
) -> bool:
    """Writes a row at every rung, those that an earlier attempt passed included. Whether it came to the last."""
    setting = bench.setting
    first, rungs = setting.splits.validation.start, itertools.count()

    def on_rung(result: RungResult) -> None:
        rung = next(rungs)
        if share.rank > 0:
            return
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
    rungs_passed = retrain(
        setting,
        student,
        bench.teacher(share),
        share,
        on_rung=on_rung,
        on_step=on_step,
        stop=stop,
        resume=bench.state(entrant, share),
    )
    return rungs_passed[-1].final
