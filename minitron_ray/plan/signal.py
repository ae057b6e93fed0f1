"""Which of the teacher's signals a search trains on, by rule, and what each of them would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from minitron_ray.core.units import format_bytes
from minitron_ray.distillation.signal import Signal, StoredSignal
from minitron_ray.distillation.signals.auto import Auto
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.signals.online import Online
from minitron_ray.distillation.signals.sampled import Sampled
from minitron_ray.distillation.signals.top_k import TopK
from minitron_ray.experiment import Experiment
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.cost import BYTES, body_flops, head_flops
from minitron_ray.models.family import Family
from minitron_ray.plan.tokens import tokens_seen

LARGEST_SIGNAL: Final = 200 * 2**30
"""Bytes that a signal which nobody asked for by name may take on disk, in bfloat16; the paper's 1.8B tokens, sampled,
fit."""
PREFERRED: Final[tuple[StoredSignal, ...]] = (FinalHidden(), FinalHidden(dtype="int8"), Sampled())
"""From exact to small. top_k is left out: it is larger than sampled, and its gradients are biased."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalCost:
    """What one kind would take over the search and the validation sequences."""

    signal: Signal
    bytes: int
    """On disk, validation included, at most (values of the computation are taken for float32 where the
    precision is open); 0 for online."""
    once: float
    """Operations of the teacher, before the trials."""
    each: float
    """Operations in every trial: the teacher's LM head, or all of the teacher, on the trial's tokens."""
    refused: str | None
    """Why it cannot be taken, None where it can."""
    chosen: bool


def signal_tokens(experiment: Experiment) -> int:
    """Tokens of which trials need the teacher, at most; 0 without a search, or where the loss takes nothing
    of it."""
    if experiment.search is None or not experiment.search.retrain.needs_teacher:
        return 0
    return experiment.search.retrain.tokens


def validation_tokens(experiment: Experiment) -> int:
    """Tokens that students are measured on."""
    return experiment.data.validation * experiment.data.sequence_length


def signal_bytes(signal: Signal, experiment: Experiment, teacher: Architecture) -> int:
    """Bytes on disk, at most: a text that is shorter than a trial is stored once, and `auto` may be either type.
    Measuring needs exact final hidden states whatever the trials train on."""
    return _bytes(
        signal, experiment, teacher, "bfloat16" if experiment.precision == "bfloat16" else "float32"
    )


def _bytes(signal: Signal, experiment: Experiment, teacher: Architecture, dtype: str) -> int:
    """The same with values of the computation of this type."""
    if not isinstance(signal, StoredSignal):
        return 0
    sizes = (teacher.hidden, teacher.vocab, BYTES[dtype])
    trained = signal_tokens(experiment) * signal.bytes_a_token(*sizes)
    return round(trained + validation_tokens(experiment) * FinalHidden().bytes_a_token(*sizes))


def choose_signal(experiment: Experiment, teacher: Architecture) -> Signal:
    """The kind that the experiment names, or else the first of `PREFERRED` that the loss takes and that
    is no larger than `LARGEST_SIGNAL`; online where none is. Without a search, of the validation sequences.
    """
    named = Auto() if experiment.search is None else experiment.search.signal
    if not isinstance(named, Auto):
        return named
    for signal in PREFERRED:
        if _refused(signal, experiment) is None and not _large(signal, experiment, teacher):
            return signal
    return Online()


def finds_correction(experiment: Experiment, before: Experiment) -> bool:
    """Whether the corrected teacher of `experiment` is there once `before`, whose teacher has the same config,
    has been run: the same recipe on the same text."""
    return experiment.teacher.correction is not None and _told(experiment) == _told(before)


def _told(experiment: Experiment) -> dict[str, object]:
    """What decides a corrected teacher, as an experiment names it."""
    told = experiment.model_dump(mode="json", include={"teacher", "data", "precision", "seed"})
    told["teacher"].pop("config")  # says what the teacher is before it is there
    correction = experiment.teacher.correction
    told["teacher"]["correction"] = None if correction is None else correction.recipe
    return told


def finds_signal(experiment: Experiment, before: Experiment, teacher: Architecture) -> bool:
    """Whether all that is stored of the `teacher` for `experiment` is there once `before`, whose teacher has
    the same config, has been run: the same text, and trials that see no other sequences."""
    here, there = (
        one.model_dump(mode="json", include={"teacher", "data", "precision"}) for one in (experiment, before)
    )
    for known in (here, there):
        known["teacher"].pop("config")  # says what the teacher is before it is there
    kinds = [choose_signal(one, teacher) for one in (experiment, before)]
    if here != there or not all(isinstance(kind, StoredSignal) for kind in kinds):
        return False
    seen, stored = _seen(experiment), _seen(before)
    if experiment.teacher.correction is not None and not finds_correction(experiment, before):
        return False  # of another teacher
    return seen == 0 or (kinds[0] == kinds[1] and experiment.seed == before.seed and seen <= stored)


def _seen(experiment: Experiment) -> int:
    """Tokens of whole optimizer steps that trials need the teacher for."""
    tokens = signal_tokens(experiment)
    if not tokens:
        return 0
    return tokens_seen(tokens, experiment.searched.retrain.batch, experiment.data.sequence_length)


def signal_costs(experiment: Experiment, family: Family, teacher: Architecture) -> tuple[SignalCost, ...]:
    """Every kind, one with the experiment's own fields where it names one, in the order of the rule."""
    chosen = choose_signal(experiment, teacher)
    known = [*PREFERRED, TopK(), Online()]
    if chosen not in known:
        place = next((n for n, signal in enumerate(known) if type(signal) is type(chosen)), 0)
        known[place] = chosen
    return tuple(_cost(signal, chosen, experiment, family, teacher) for signal in known)


def _cost(
    signal: Signal, chosen: Signal, experiment: Experiment, family: Family, teacher: Architecture
) -> SignalCost:
    trained, measured = signal_tokens(experiment), validation_tokens(experiment)
    body, head = body_flops(family, teacher, experiment.data.sequence_length), head_flops(teacher)
    if not isinstance(signal, StoredSignal):
        once, each = 0, trained * (body + head)
    elif signal.sparse:
        once, each = trained * (body + head) + measured * body, 0
    else:
        once, each = (trained + measured) * body, trained * head
    return SignalCost(
        signal=signal,
        bytes=signal_bytes(signal, experiment, teacher),
        once=float(once),
        each=float(each),
        refused=_refused(signal, experiment) or _too_large(signal, experiment, teacher),
        chosen=signal == chosen,
    )


def _refused(signal: Signal, experiment: Experiment) -> str | None:
    """Why the trials' loss cannot take a signal."""
    if experiment.search is None or not signal.sparse:
        return None
    loss = experiment.search.retrain.loss
    return None if loss.refuses_sparse is None else f"the loss {loss.kind} {loss.refuses_sparse}"


def _too_large(signal: Signal, experiment: Experiment, teacher: Architecture) -> str | None:
    """Only of kinds that the rule would have to take unasked."""
    named = experiment.search is not None and experiment.search.signal == signal
    if named or not _large(signal, experiment, teacher):
        return None
    return f"larger than {format_bytes(LARGEST_SIGNAL)} in bfloat16: only where search.signal names it"


def _large(signal: Signal, experiment: Experiment, teacher: Architecture) -> bool:
    """By values in bfloat16 whatever the precision: `auto` is settled by the device that a run finds, and the plan
    before it is to choose the same."""
    return _bytes(signal, experiment, teacher, "bfloat16") > LARGEST_SIGNAL
