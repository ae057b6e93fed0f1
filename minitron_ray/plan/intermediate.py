"""Which hidden states a student is to match beside the logits, by rule or as the experiment says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from minitron_ray.distillation.intermediate.embedding import Embedding
from minitron_ray.distillation.intermediate.hidden_states import HiddenStates
from minitron_ray.distillation.sections import Distillation
from minitron_ray.distillation.state_loss import Intermediate, StateLoss, intermediate_of
from minitron_ray.models.family import Family
from minitron_ray.search.space import CandidateRow

DEPTH_HEAVY: Final = 0.25
"""Share of the teacher's layers from which on a student counts as cut in depth. The paper has 16 of 32 gone
(Appendix A.6, Table 17: hidden states and embedding help) and none to four (§4.1, Table 18: they do not);
where it turns, between the two, it does not say."""
BEST: Final[tuple[StateLoss, ...]] = (HiddenStates(), Embedding())
"""The paper's best: (last-2):(last-2) and the embedding, by cosine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a student of so many layers is trained to match."""

    losses: tuple[StateLoss, ...]
    """Empty: the logits alone."""
    reason: str
    """Why, for people."""

    @property
    def label(self) -> str:
        kinds = [str(loss.kind) for loss in self.losses]  # type: ignore[attr-defined]  # every plug-in has one
        return " + ".join(["logits", *kinds])


def choose_intermediate(section: Distillation, family: Family, teacher: int, student: int) -> Chosen:
    """By name, or by rule where it says `auto`: hidden states and embedding for a student that has lost a
    quarter of the `teacher` layers or more, else nothing."""
    without_norm = f"layers of {family.model_type} take their inputs without a norm"
    return _choose(section, None if family.norms_inputs else without_norm, teacher, student)


def trained_by(section: Distillation, teacher: int, student: int, compared: bool) -> str:
    """For people: what a student that was distilled so was trained on, and why. `compared` is whether its steps
    have a loss of hidden states."""
    unheard = _is_heavy(teacher, student) and not compared
    without_norm = "layers of this model type take their inputs without a norm" if unheard else None
    chosen = _choose(section, without_norm, teacher, student)
    if section.intermediate == ():
        chosen = replace(chosen, reason=f"no intermediate states, {chosen.reason}")
    weight = f", weight {section.intermediate_weight}" if chosen.losses else ""
    return f"trained on {chosen.label}{weight} ({chosen.reason})"


def _choose(section: Distillation, without_norm: str | None, teacher: int, student: int) -> Chosen:
    """`without_norm` is why no states can be compared by rule, None where they can."""
    if section.intermediate != "auto":
        return Chosen(losses=tuple(section.intermediate), reason="as the experiment says")
    if not section.loss.needs_teacher:
        return Chosen(losses=(), reason=_without_teacher(section))
    if without_norm is not None:
        return Chosen(losses=(), reason=without_norm)
    return _by_depth(teacher, student)


def _is_heavy(teacher: int, student: int) -> bool:
    return teacher - student >= DEPTH_HEAVY * teacher


def _by_depth(teacher: int, student: int) -> Chosen:
    gone = f"{teacher - student} of {teacher} layers gone"
    if _is_heavy(teacher, student):
        return Chosen(losses=BEST, reason=f"{gone}, {DEPTH_HEAVY:.0%} or more (paper Appendix A.6, Table 17)")
    return Chosen(losses=(), reason=f"{gone}, fewer than {DEPTH_HEAVY:.0%} (paper §4.1, Table 18)")


def _without_teacher(section: Distillation) -> str:
    return f"the loss {section.loss.kind} takes nothing of the teacher"


def resolve_intermediate(
    section: Distillation, family: Family, teacher: int, student: int
) -> Intermediate | None:
    """The modules to compare, for a teacher and a student of so many layers; None for the logits alone.

    Raises ConfigError for layers that are not there, and for a family without norms to listen behind.
    """
    weight = None if section.intermediate_weight == "dynamic" else section.intermediate_weight
    chosen = choose_intermediate(section, family, teacher, student)
    return intermediate_of(chosen.losses, weight, family, teacher, student)


def check_intermediate(
    section: Distillation, family: Family, teacher: int, rows: Sequence[CandidateRow]
) -> None:
    """Raises ConfigError where a candidate could not be trained as the section says."""
    for layers in sorted({row.candidate.layers for row in rows if row.in_budget}):
        resolve_intermediate(section, family, teacher, layers)


def trained_on(section: Distillation, family: Family, teacher: int, layers: Sequence[int]) -> list[str]:
    """One line for each way in which students of these numbers of layers are trained, and why."""
    found: dict[str, list[int]] = {}
    for count in sorted(set(layers), reverse=True):
        found.setdefault(choose_intermediate(section, family, teacher, count).label, []).append(count)
    lines = []
    for label, counts in found.items():
        whom = f"{_range(counts)} layers: " if len(found) > 1 else ""
        reasons = {choose_intermediate(section, family, teacher, count).reason for count in counts}
        why = reasons.pop() if len(reasons) == 1 else _of_several(section, teacher, counts)
        weight = "" if label == "logits" else f", weight {section.intermediate_weight}"
        lines.append(f"{whom}{label}{weight} ({why})")
    return lines


def _of_several(section: Distillation, teacher: int, counts: Sequence[int]) -> str:
    lost = "a quarter or more" if _is_heavy(teacher, counts[0]) else "less than a quarter"
    return f"{lost} of {teacher} layers gone; paper Appendix A.6"


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[-1]} to {counts[0]}"
