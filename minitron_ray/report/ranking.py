"""`rank`: the teacher and every student that was tried, best first, from a run's tables alone.

Distilled students come first, by their loss after distillation; then those that finished the
search, by their loss after retraining; then those that halving stopped, still run, or failed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from minitron_ray.experiment import Budget
from minitron_ray.models import architecture
from minitron_ray.report import tables
from minitron_ray.report.findings import Findings, read_findings, sections
from minitron_ray.report.plan_actual import StageActual, actual_section, plan_against_actual
from minitron_ray.report.sections import Section
from minitron_ray.report.tables import Tables
from minitron_ray.report.text_sources import read_sources, sources_section
from minitron_ray.report.training import trained_on, training_section
from minitron_ray.results.runs import RunInfo

_ORDER = ("distilled", "distilling", "cut", "completed", "stopped", "running", "failed")
_WAITING = {
    "prepare": "the data is not prepared",
    "correct": "the teacher is not corrected",
    "importance": "the teacher's units are not scored",
    "teacher": "the teacher's signal is not recorded",
    "zero_shot": "undistilled cuts are not measured",
    "search": "the search has not finished",
    "baselines": "baselines have not finished",
    "distill": "the distillation has not finished",
    "evaluate": "teacher and students are not evaluated",
    "export": "no student is exported",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model. Losses are nats per token on the validation sequences; None is not known (yet)."""

    subject: str
    """`teacher`, or the candidate's id."""
    rank: int | None
    """From 1 for students that the run has not dropped, None for the others, the teacher, and those that a search
    has completed while others are still to come."""
    status: str
    """teacher, distilled, distilling, cut, completed, stopped, running or failed."""
    shape: str | None
    parameters: int | None
    budget_distance: float | None
    """(parameters - target) / target: the target is the budget's centre, or a range's nearest edge."""
    cut_loss: float | None
    search_loss: float | None
    final_loss: float | None
    """After distillation; the teacher's own."""
    perplexity: float | None
    """exp of the last of the three losses."""
    recovery: float | None
    """The teacher's perplexity over this one's: 1 is as good as the teacher."""
    tokens: int | None
    """Distillation tokens behind the last loss."""
    seconds: float | None
    """Wall time of its trial and of its distillation steps."""
    reason: str | None
    export: str | None
    """Folder of the exported model, relative to the run folder."""
    behind: dict[str, Any] | None = None
    """The row of `comparisons` with the best distilled student, or the search's winner at its last rung."""

    @property
    def tied(self) -> bool:
        """With the best of its status, one that halving stopped with the search's best where it was stopped, as
        far as the validation sequences can tell."""
        ended = self.status in ("distilled", "completed", "stopped")
        return ended and self.behind is not None and bool(self.behind["tied"])

    @property
    def loss(self) -> float | None:
        """The last of the three losses."""
        losses = (self.final_loss, self.search_loss, self.cut_loss)
        return next((loss for loss in losses if loss is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """What `report` shows. `missing` says in sentences what an unfinished run does not have yet."""

    experiment: str
    run_id: str
    folder: str
    status: str
    stages: tuple[str, ...]
    """Those that the run has, done or not."""
    budget: str | None
    entries: tuple[Entry, ...]
    missing: tuple[str, ...]
    findings: Findings
    costs: tuple[StageActual, ...] = ()
    sources: tuple[dict[str, Any], ...] = ()
    """What each source of the text gave, see the table `sources`."""
    sections: tuple[Section, ...] = ()
    """What stands under the ranking."""
    rehearsal: bool = False
    """Of a rehearsal nothing is ranked."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        fields = {
            name: getattr(self, name)
            for name in ("experiment", "run_id", "folder", "status", "rehearsal", "budget")
        }
        return {
            **fields,
            "stages": list(self.stages),
            "entries": [asdict(entry) | {"tied": entry.tied} for entry in self.entries],
            "missing": list(self.missing),
            **asdict(self.findings),
            "costs": [cost.as_json() for cost in self.costs],
            "sources": list(self.sources),
        }


def rank(run: RunInfo) -> Ranking:
    """Ranks what a run, finished or not, has in its tables."""
    found = tables.read(run.store)
    resolved = _resolved(run.folder)
    budget = resolved.get("budget")
    teacher = _teacher(found, run.folder)
    findings = read_findings(run.store)
    distilling = "evaluate" in run.stages_waiting  # till then nothing says what a distilled student is worth
    students = [_student(name, found, budget, teacher, distilling) for name in _names(found)]
    students = [replace(one, behind=findings.behind(one.subject, _phase(one))) for one in students]
    students.sort(key=_place)
    costs, sources = plan_against_actual(run), read_sources(run.store)
    return Ranking(
        experiment=run.experiment,
        run_id=run.run_id,
        folder=str(run.folder),
        status=run.status,
        rehearsal=run.rehearsal,
        stages=run.stages,
        budget=_budget_text(budget, (resolved.get("data") or {}).get("sequence_length", 256)),
        entries=(teacher, *(students if run.rehearsal else _numbered(students, run.stages_waiting))),
        missing=tuple(_missing(run, found, resolved)),
        findings=findings,
        costs=costs,
        sources=sources,
        sections=(
            *sections(findings, _shapes(found)),
            *training_section(
                run.store,
                _shapes(found),
                trained_on(
                    resolved.get("distill"), _prepared_teacher(run.folder).get("layers"), _layers(found)
                ),
            ),
            *sources_section(sources),
            *((actual_section(costs),) if costs else ()),
        ),
    )


def _shapes(found: Tables) -> dict[str, str]:
    """Shapes for people, by candidate."""
    return {name: text for name, row in found.candidates.items() if (text := shape_text(row)) is not None}


def _layers(found: Tables) -> dict[str, int]:
    return {name: row["layers"] for name, row in found.candidates.items() if row.get("layers") is not None}


def shape_text(row: dict[str, Any]) -> str | None:
    """A row's sizes for people, see `models.architecture.shape_text`; None for a row without sizes."""
    names = ("layers", "hidden", "heads", "kv_heads", "mlp")
    if any(row.get(name) is None for name in names):
        return None
    # Tables from before there were experts do not say that there are none.
    experts = [row.get(name) or 0 for name in ("experts", "expert_mlp")]
    return architecture.shape_text(*(row[name] for name in names), *experts)


def budget_distance(parameters: int | None, budget: dict[str, Any] | None) -> float | None:
    """How far a count is from the budget's centre, or from the nearest end of a range or limit (0 inside);
    None for a budget that doesn't bound parameters."""
    if parameters is None or not budget:
        return None
    bounds = Budget.model_validate(budget).parameters
    if bounds is None:
        return None
    low, high = bounds.ends(0)
    target = bounds.centre or min(max(parameters, low), high)
    return (parameters - target) / target


def _teacher(found: Tables, folder: Path) -> Entry:
    row = _prepared_teacher(folder)
    loss = _measured(found, "teacher", "teacher")
    return Entry(
        subject="teacher",
        rank=None,
        status="teacher",
        shape=shape_text(row),
        parameters=row.get("parameters"),
        budget_distance=None,
        cut_loss=None,
        search_loss=None,
        final_loss=loss,
        perplexity=_perplexity(loss),
        recovery=None if loss is None else 1.0,
        tokens=None,
        seconds=None,
        reason=None,
        export=None,
    )


def _student(
    name: str, found: Tables, budget: dict[str, Any] | None, teacher: Entry, distilling: bool
) -> Entry:
    """`distilling`: whether the run still does; steps of a student that was once the search's winner say nothing."""
    trial, distillation = found.trials.get(name), found.distillations.get(name)
    sizes = found.candidates.get(name) or (trial.shape if trial else {})
    last = trial.last if trial else None
    cut, distilled = _measured(found, name, "cut"), _measured(found, name, "distilled")
    if cut is None and trial and 0 in trial.rungs:
        cut = trial.rungs[0]["val_loss"]
    searched = last["val_loss"] if last else None
    final = next((loss for loss in (distilled, searched, cut) if loss is not None), None)
    counted = (
        "non_embedding_parameters" if budget and budget.get("count") == "non_embedding" else "parameters"
    )
    tokens = last["tokens"] if last else None
    if distilled is not None:
        tokens = found.evaluations[name, "distilled", "val_loss"]["distill_tokens"]
    times = [part.seconds for part in (trial, distillation) if part and part.seconds]
    perplexity = _perplexity(final)
    return Entry(
        subject=name,
        rank=None,
        status=_status(
            distilled, distilling and distillation is not None, cut, trial.status if trial else None
        ),
        shape=shape_text(sizes),
        parameters=sizes.get("parameters"),
        budget_distance=budget_distance(sizes.get(counted), budget),
        cut_loss=cut,
        search_loss=searched,
        final_loss=distilled,
        perplexity=perplexity,
        recovery=teacher.perplexity / perplexity if teacher.perplexity and perplexity else None,
        tokens=tokens,
        seconds=sum(times) if times else None,
        reason=trial.reason if trial else None,
        export=found.exports[name]["path"] if name in found.exports else None,
    )


def _names(found: Tables) -> list[str]:
    """Every candidate that something was done with, in a stable order."""
    evaluated = [subject for subject, _, _ in found.evaluations if subject != "teacher"]
    return sorted({*found.trials, *found.distillations, *evaluated})


def _measured(found: Tables, subject: str, phase: str) -> float | None:
    row = found.evaluations.get((subject, phase, "val_loss"))
    return row["value"] if row else None


def _perplexity(loss: float | None) -> float | None:
    if loss is None or math.isnan(loss):
        return None
    return math.exp(loss) if loss < 700 else math.inf


def _status(distilled: float | None, stepping: bool, cut: float | None, trial: str | None) -> str:
    if distilled is not None:
        return "distilled"
    if stepping:
        return "distilling"
    return trial or ("running" if cut is None else "cut")


def _phase(entry: Entry) -> str:
    """Where it is compared with others of its status: a distilled student is not behind whom its trial was."""
    return "distilled" if entry.status == "distilled" else "search"


def _place(entry: Entry) -> tuple[int, float, str]:
    loss = math.inf if entry.loss is None else entry.loss
    return _ORDER.index(entry.status), math.inf if math.isnan(loss) else loss, entry.subject


def _numbered(students: list[Entry], waiting: Collection[str]) -> Iterator[Entry]:
    """Those that finished the search only where it has: until then it may find better ones."""
    place, ranked = 0, ["distilled", "distilling", "cut"]
    ranked += [] if "search" in waiting else ["completed"]
    for entry in students:
        if entry.status in ranked:
            place += 1
            yield replace(entry, rank=place)
        else:
            yield entry


def _missing(run: RunInfo, found: Tables, resolved: dict[str, Any]) -> Iterator[str]:
    for stage in run.stages_waiting:
        yield _WAITING[stage] + _how_far(stage, found, resolved)


def _how_far(stage: str, found: Tables, resolved: dict[str, Any]) -> str:
    if stage == "search" and found.trials:
        ended = sum(trial.status != "running" for trial in found.trials.values())
        wanted = (resolved.get("search") or {}).get("trials")
        return f": {ended} of at most {wanted} trials ended" if wanted else f": {ended} trials ended"
    if stage == "distill" and found.distillations:
        wanted = (resolved.get("distill") or {}).get("tokens")
        of = f" of {wanted:,}" if wanted else ""
        parts = [f"{name} at {d.tokens:,}{of} tokens" for name, d in sorted(found.distillations.items())]
        return f": {', '.join(parts)}"
    return ""


def _resolved(folder: Path) -> dict[str, Any]:
    path = folder / "resolved.yaml"
    if not path.is_file():
        return {}
    return YAML(typ="safe", pure=True).load(path) or {}


def _prepared_teacher(folder: Path) -> dict[str, Any]:
    """The sizes the prepare stage recorded under `teacher` in its output."""
    path = folder / "stages" / "prepare.json"
    if not path.is_file():
        return {}
    return json.loads(path.read_bytes())["output"].get("teacher") or {}


def _budget_text(budget: dict[str, Any] | None, length: int) -> str | None:
    """The bands, for people; `length` are the tokens of a sequence of the data."""
    return Budget.model_validate(budget).limits(length).text() if budget else None
