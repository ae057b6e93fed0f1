"""`compare`: an ablation's variants side by side, from their runs' tables alone, beside the paper's figures.

Losses are nats a token on the validation sequences, which all variants share: two variants are
compared sequence by sequence, which takes out what makes a sequence hard for every model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML

from minitron_ray.ablation import Ablation
from minitron_ray.experiment import Experiment
from minitron_ray.report import tables
from minitron_ray.report.ranking import shape_text
from minitron_ray.results.runs import RunInfo, find_runs
from minitron_ray.search.ranks import kendall_tau

PHASES: Final = ("cut", "distilled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the run of one variant left in its tables. `losses` and `divergences` (KL to the teacher) are by
    phase, `sequences` by phase and validation sequence."""

    variant: str
    status: str
    """Of its run, or `not run`."""
    reason: str | None = None
    """Why it did not succeed."""
    run_id: str | None = None
    shape: str | None = None
    parameters: int | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    divergences: Mapping[str, float] = field(default_factory=dict)
    sequences: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    teacher_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One variant of the comparison; None is not known. Ranks count from 1, ties share theirs."""

    variant: str
    status: str
    reason: str | None
    run_id: str | None
    shape: str | None
    parameters: int | None
    cut_loss: float | None
    cut_perplexity: float | None
    cut_divergence: float | None
    distilled_loss: float | None
    distilled_perplexity: float | None
    distilled_divergence: float | None
    difference: float | None
    """Mean over the sequences of this variant's loss minus the best variant's."""
    difference_stderr: float | None
    """Standard error of that mean; None for the best variant itself."""
    rank: int | None
    paper: float | None
    paper_rank: int | None
    teacher_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An ablation's answer. `tau` is Kendall's, 1 where the two orders agree, -1 where they are reversed."""

    ablation: str
    question: str
    measure: str
    rows: tuple[Row, ...]
    best: str | None
    sequences: int
    """Validation sequences behind the best variant's loss."""
    tau: float | None
    tau_variants: int
    """How many variants have a figure here and in the paper."""
    source: str | None
    unit: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}


def compare(ablation: Ablation, outcomes: Sequence[Outcome]) -> Comparison:
    """Ranks the variants by the loss that the ablation compares."""
    measure, paper = ablation.measure, ablation.paper
    ours = {o.variant: o.losses[measure] for o in outcomes if measure in o.losses}
    figures = dict(paper.figures) if paper else {}
    sign = -1.0 if paper and paper.better == "higher" else 1.0
    theirs = {name: sign * figure for name, figure in figures.items()}
    best = min(ours, key=lambda name: ours[name]) if ours else None
    of_best = next((o.sequences.get(measure, {}) for o in outcomes if o.variant == best), {})
    shared = [name for name in ours if name in theirs]
    rank, paper_rank = ranks(ours), ranks(theirs)
    rows = [
        _row(
            outcome,
            paired(outcome.sequences.get(measure, {}), of_best) if outcome.variant != best else (0.0, None),
            rank.get(outcome.variant),
            figures.get(outcome.variant),
            paper_rank.get(outcome.variant),
        )
        for outcome in outcomes
    ]
    return Comparison(
        ablation=ablation.name,
        question=ablation.question,
        measure=measure,
        rows=tuple(rows),
        best=best,
        sequences=len(of_best),
        tau=kendall_tau([ours[name] for name in shared], [theirs[name] for name in shared]),
        tau_variants=len(shared),
        source=paper.source if paper else None,
        unit=paper.unit if paper else None,
    )


# --- Arithmetic -----------------------------------------------------------------------------------------


def ranks(values: Mapping[str, float]) -> dict[str, int]:
    """1 for the smallest; equal values share the rank, and the next one counts them all."""
    return {name: 1 + sum(other < value for other in values.values()) for name, value in values.items()}


def paired(ours: Mapping[int, float], best: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Mean difference over the sequences and its standard error.

    None where the two were not measured on the same sequences; no error from less than two.
    """
    if not best or set(ours) != set(best):
        return None, None
    differences = [ours[sequence] - best[sequence] for sequence in sorted(best)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count < 2:
        return mean, None
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    return mean, math.sqrt(variance / count)


def perplexity(loss: float | None) -> float | None:
    """exp(loss), infinite where a float has no number for it."""
    if loss is None:
        return None
    return math.exp(loss) if loss < 700 else math.inf


def _row(
    outcome: Outcome,
    difference: tuple[float | None, float | None],
    rank: int | None,
    paper: float | None,
    paper_rank: int | None,
) -> Row:
    cut, distilled = (outcome.losses.get(phase) for phase in PHASES)
    return Row(
        variant=outcome.variant,
        status=outcome.status,
        reason=outcome.reason,
        run_id=outcome.run_id,
        shape=outcome.shape,
        parameters=outcome.parameters,
        cut_loss=cut,
        cut_perplexity=perplexity(cut),
        cut_divergence=outcome.divergences.get("cut"),
        distilled_loss=distilled,
        distilled_perplexity=perplexity(distilled),
        distilled_divergence=outcome.divergences.get("distilled"),
        difference=difference[0] if rank is not None else None,
        difference_stderr=difference[1] if rank is not None else None,
        rank=rank,
        paper=paper,
        paper_rank=paper_rank,
        teacher_loss=outcome.teacher_loss,
    )


# --- From a run's tables --------------------------------------------------------------------------------


def recorded_run(results: Path, experiment: Experiment) -> RunInfo | None:
    """The newest run of exactly this experiment, one that succeeded if there is any; None if there is none."""
    resolved = experiment.model_dump(mode="json")
    same = [
        run
        for run in find_runs(results)
        if run.experiment == experiment.name and _resolved(run.folder) == resolved
    ]
    return max(same, key=lambda run: (run.status == "succeeded", run.created), default=None)


def _resolved(folder: Path) -> Any:
    path = folder / "resolved.yaml"
    return YAML(typ="safe", pure=True).load(path) if path.is_file() else None


def outcome_of(variant: str, run: RunInfo, measure: str) -> Outcome:
    """What a run's tables say of its best student: the one that did best in the phase that is compared."""
    found = tables.read(run.store)
    figures = found.evaluations
    subject = _subject(figures, measure)
    losses, divergences = _figures(figures, subject, "val_loss"), _figures(figures, subject, "val_divergence")
    teacher = figures.get(("teacher", "teacher", "val_loss"))
    sizes = found.candidates.get(subject or "", {})
    sequences: dict[str, dict[int, float]] = {}
    for row in run.store.read("sequence_losses").to_pylist():
        if subject is not None and row["subject"] == subject and row["phase"] in PHASES:
            sequences.setdefault(row["phase"], {})[row["sequence"]] = row["loss"]
    return Outcome(
        variant=variant,
        status=run.status,
        reason=None if run.status == "succeeded" else _reason(run),
        run_id=run.run_id,
        shape=shape_text(sizes),
        parameters=sizes.get("parameters"),
        losses=losses,
        divergences=divergences,
        sequences=sequences,
        teacher_loss=teacher["value"] if teacher else None,
    )


_Figures = Mapping[tuple[str, str, str], Mapping[str, Any]]


def _subject(figures: _Figures, measure: str) -> str | None:
    """The student with the lowest loss in a phase: the one that is compared, else any."""
    students = [
        (key[1] != measure, row["value"], key[0])
        for key, row in figures.items()
        if key[0] != "teacher" and key[1] in PHASES and key[2] == "val_loss" and _is_number(row["value"])
    ]
    return min(students)[2] if students else None


def _figures(figures: _Figures, subject: str | None, metric: str) -> dict[str, float]:
    known = {phase: figures.get((subject or "", phase, metric)) for phase in PHASES}
    return {phase: row["value"] for phase, row in known.items() if row and _is_number(row["value"])}


def _is_number(value: float | None) -> bool:
    """A loss that came out as NaN is no figure to compare."""
    return value is not None and not math.isnan(value)


def _reason(run: RunInfo) -> str | None:
    """The last stage that failed, with what it said."""
    failed = [row for row in run.store.read("stages").to_pylist() if row["status"] == "failed"]
    last = max(failed, key=lambda row: row["at"], default=None)
    return f"{last['stage']}: {last['summary']}" if last else None
