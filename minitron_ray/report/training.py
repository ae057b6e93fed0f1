"""How the distillations went: speed, utilization, memory, skipped steps, divergence from the teacher."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final

from minitron_ray.core.units import format_bytes, format_count
from minitron_ray.distillation.divergence import rise
from minitron_ray.experiment import Distill
from minitron_ray.plan.intermediate import trained_by
from minitron_ray.report.findings import NONE
from minitron_ray.report.sections import Section
from minitron_ray.results.store import Store

Row = dict[str, Any]
TrainedOn = Callable[[str, bool], str | None]
"""What a candidate was trained on, for people, by its id and whether hidden states were compared."""
_TEACHER: Final = "teacher"
_RULE: Final = ("tokens", "loss", "intermediate", "intermediate_weight")


def trained_on(
    section: Mapping[str, Any] | None, teacher: int | None, layers: Mapping[str, int]
) -> TrainedOn:
    """By the experiment's `distill`, for a teacher and candidates of so many layers; None what is not known."""
    found = {name: section[name] for name in _RULE if name in section} if section else None
    # A run from before hidden states were compared does not say that they were not.
    distill = Distill.model_validate({"intermediate": [], **found}) if found else None

    def told(candidate: str, compared: bool) -> str | None:
        if distill is None or teacher is None or candidate not in layers:
            return None
        return trained_by(distill, teacher, layers[candidate], compared)

    return told


def training_section(
    store: Store, names: Mapping[str, str], trained_on: TrainedOn = lambda candidate, compared: None
) -> tuple[Section, ...]:
    """One section, or none where nothing was distilled. `names` are the candidates' shapes."""
    by_student: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in store.read("steps").to_pylist():
        if row["skipped"] is None:  # of a run from before these figures were kept
            continue
        by_student[row["candidate_id"]][row["step"]] = row
    if not by_student:
        return ()
    planned = {row["stage"]: row["memory_bytes"] for row in store.read("costs").to_pylist()}
    rows, notes = [], []
    for student, steps in sorted(by_student.items()):
        ordered = [steps[number] for number in sorted(steps)]
        name = "teacher, corrected" if student == _TEACHER else names.get(student, student)
        rows.append((name, *_figures(ordered, planned.get("correct" if student == _TEACHER else "distill"))))
        on = trained_on(student, any(row["intermediate_loss"] is not None for row in ordered))
        notes += [f"{name}: {note}" for note in ([] if on is None else [on]) + _notes(ordered)]
    return (
        Section(
            title="Training, step by step",
            header=("student", "tokens", "tokens/s", "MFU", "memory\na worker", "planned", "divergence"),
            rows=tuple(rows),
            notes=tuple(notes),
        ),
    )


def _figures(steps: list[Row], planned: int | None) -> tuple[str, ...]:
    """Without the skipped steps, which are a note where there are any. `planned` is of the largest student, spread over
    the fewest workers."""
    speed, share = _mean(steps, "tokens_per_second"), _mean(steps, "mfu")
    memory = max((row["peak_memory"] or 0 for row in steps), default=0)
    divergences = _divergences(steps)
    return (
        format_count(steps[-1]["tokens"]),
        NONE if speed is None else format_count(speed),
        NONE if share is None else f"{share:.1%}",
        format_bytes(memory) if memory else NONE,
        format_bytes(planned) if planned else NONE,
        " → ".join(f"{value:.4f}" for value in dict.fromkeys((divergences[0][1], divergences[-1][1])))
        if divergences
        else NONE,
    )


def _notes(steps: list[Row]) -> list[str]:
    skipped = [str(row["step"]) for row in steps if row["skipped"]]
    found = []
    if skipped:
        named = ", ".join(skipped[:8]) + (f" and {len(skipped) - 8} more" if len(skipped) > 8 else "")
        found.append(f"skipped, as loss or gradient was not finite: step {named}")
    if (risen := rise(_divergences(steps))) is not None:
        found.append(risen)
    return found


def _divergences(steps: list[Row]) -> list[tuple[int, float]]:
    return [(row["tokens"], row["val_divergence"]) for row in steps if row["val_divergence"] is not None]


def _mean(steps: list[Row], column: str) -> float | None:
    """Over time: every step takes the same tokens, so that the mean of rates is harmonic."""
    values = [row[column] for row in steps if row[column]]
    return len(values) / sum(1 / value for value in values) if values else None
