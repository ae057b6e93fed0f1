"""The same experiment in miniature, for a rehearsal: every stage and every rule, on a model, a space, a text
and budgets of tokens that are small.

Arithmetic only. Shapes of the miniature are those of the real plan with every axis scaled from the real
model that is cut to the small one, so that what can be cut there can be cut here, by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.units import Choices
from minitron_ray.experiment import Budget, Experiment, Search, Shape, Space
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.budget import Limits
from minitron_ray.models.family import Family
from minitron_ray.plan.plan import Plan
from minitron_ray.plan.signal import choose_signal
from minitron_ray.search.shape import Candidate, Refusals
from minitron_ray.search.space import SPACE_AXES, CandidateRow, enumerate_candidates

LENGTH: Final = 64
"""Tokens of a sequence, at most."""
SEQUENCES: Final = 4
"""To calibrate, to validate, and of an optimizer step, at most."""
SHAPES: Final = 4
"""Of the real plan's feasible shapes, taken evenly over them, that the space of the miniature is made of."""
TRIALS: Final = 3
DISTILL_STEPS: Final = 8
CORRECTION_STEPS: Final = 4
MOST_TRIAL_STEPS: Final = 16
TRAINED_SEQUENCES: Final = SEQUENCES * MOST_TRIAL_STEPS
"""At most, of any part."""
_LAYERS: Final = 4
"""That stay of the small model at the least, as far as the real one has them."""
_MOST_NEURONS: Final = 1024
"""Of an MLP: the hidden size of families that tie it to wide heads would ask for many more."""
_CHANNELS: Final = 16
"""Of the hidden size, a query head."""
_TOKEN_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Of a tokenizer that stands in for the real one: its size, and the id that ends a text."""

    size: int
    end: int


def small_config(
    family: Family,
    config: Mapping[str, Any],
    spare_layers: int,
    vocabulary: Vocabulary | None = None,
) -> dict[str, Any]:
    """A `config.json` of the same family with small sizes, of which `spare_layers` can go.

    `head_dim` stays, which rotary positions depend on, and with the real tokenizer the vocabulary; a model
    that is small already stays as it is.
    """
    whole = family.read(config)
    small = _smaller(family, whole, spare_layers)
    if vocabulary is not None:
        small = replace(small, vocab=vocabulary.size)
    written = family.attributes.write(config, small, family.causal_lm, tuple(range(small.layers)))
    if vocabulary is not None:
        # Where one is absent, stock transformers takes that of the family's own tokenizer.
        written |= dict.fromkeys(_TOKEN_IDS, vocabulary.end)
    if problems := family.problems(family.read(written)):
        raise ConfigError(f"rehearsal: no small {family.model_type} can be built: {'; '.join(problems)}")
    return written


def _smaller(family: Family, whole: Architecture, spare_layers: int) -> Architecture:
    kv_heads = min(whole.kv_heads, 2 if whole.kv_heads < whole.heads else 4)
    heads = kv_heads * whole.heads_per_group
    square = _square(family, whole)
    hidden = heads * (whole.head_dim if square else _CHANNELS)
    if hidden >= whole.hidden:
        hidden, heads, kv_heads = whole.hidden, whole.heads, whole.kv_heads
    ratio = min(whole.mlp / whole.hidden, 4.0)
    return whole.with_sizes(
        layers=min(whole.layers, spare_layers + _LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        mlp=min(whole.mlp, _MOST_NEURONS, _multiple(hidden * ratio, 8)) if whole.mlp else 0,
        experts=min(whole.experts, max(8, 2 * whole.active_experts)),
        expert_mlp=min(whole.expert_mlp, 32),
    )


def lost_layers(plan: Plan) -> int:
    """The most layers that the plan takes away, or scores as one block."""
    shapes = [row.candidate.layers for row in plan.feasible]
    return max(plan.start.layers - min(shapes), *plan.experiment.importance.depth.blocks, 0)


def small_experiment(plan: Plan, small: Architecture) -> Experiment:
    """The plan's experiment for `small` in the place of the model that is cut; teacher, start and text are
    still the real ones.

    Raises ConfigError where no shape can be cut out of `small`.
    """
    experiment = plan.experiment
    data = experiment.data.model_copy(
        update={
            "sequence_length": min(experiment.data.sequence_length, LENGTH),
            "calibration": min(experiment.data.calibration, SEQUENCES),
            "validation": min(experiment.data.validation, SEQUENCES),
        }
    )
    sized: dict[str, Any] = {"data": data}
    shapes = _shapes(plan, small)
    if experiment.shape is not None:
        axes = experiment.shape.sizes
        sized["shape"] = Shape(**{axis: getattr(shapes[0], axis) for axis in axes})
    else:
        sized |= _small_search(plan, small, shapes, data.sequence_length)
    if experiment.distill is not None:
        sized["distill"] = _trained(experiment.distill, DISTILL_STEPS, data.sequence_length)
    if experiment.teacher.correction is not None:
        correction = _trained(experiment.teacher.correction, CORRECTION_STEPS, data.sequence_length)
        sized["teacher"] = experiment.teacher.model_copy(update={"correction": correction})
    return experiment.model_copy(update=sized)


def _trained(section: Any, steps: int, length: int) -> Any:
    """A section that trains, for so many optimizer steps, with four checkpoints and two validations."""
    batch = min(section.batch, SEQUENCES)
    step = batch * length
    fields = {"batch": batch, "tokens": steps * step}
    fields |= {"checkpoint_every": max(1, steps // 4) * step, "validate_every": max(1, steps // 2) * step}
    return section.model_copy(update=fields)


# --- The search -----------------------------------------------------------------------------------------


def _small_search(
    plan: Plan, small: Architecture, shapes: Sequence[Candidate], length: int
) -> dict[str, Any]:
    """The sections `budget` and `search`."""
    experiment, search = plan.experiment, plan.experiment.searched
    named = [axis for axis in SPACE_AXES if getattr(search.space, axis) is not None]
    space = Space(
        **{axis: Choices(values=tuple(sorted({getattr(s, axis) for s in shapes}))) for axis in named}
    )
    rows = enumerate_candidates(
        plan.family, small, space, replace(_limits(experiment, length), bands=()), experiment.cut
    )
    kept = [row for row in rows if row.candidate in shapes]
    budget = _budget(experiment, kept)
    limits = budget.limits(length)
    feasible = sum(row.reason is None and not limits.violation(_counts(row)) for row in rows)
    return {"budget": budget, "search": _sized_search(plan, search, space, feasible, length)}


def _limits(experiment: Experiment, length: int) -> Limits:
    assert experiment.budget is not None
    return experiment.budget.limits(length)


def _budget(experiment: Experiment, rows: Sequence[CandidateRow]) -> Budget:
    """Bounds on what the real budget bounds, as wide as the shapes need."""
    real = experiment.budget
    assert real is not None
    counted = "parameters" if real.count == "total" else "non_embedding_parameters"
    columns = {"parameters": counted, "memory": "memory_bytes", "flops": "flops_per_token"}
    bounds = {}
    for name, column in columns.items():
        if getattr(real, name) is not None:
            found = [getattr(row, column) for row in rows]
            bounds[name] = f"{min(found)}..{max(found) + 1}"
    return Budget.model_validate({**bounds, "count": real.count, "at": real.at.model_dump()})


def _counts(row: CandidateRow) -> dict[str, int]:
    names = ("parameters", "non_embedding_parameters", "memory_bytes", "flops_per_token")
    return {name: getattr(row, name) for name in names}


def _sized_search(plan: Plan, search: Search, space: Space, feasible: int, length: int) -> Search:
    """Without rules of serving: no small shape keeps to multiples of hundreds. The teacher's signal is of
    the kind that the real plan takes."""
    rungs = min(search.retrain.rungs, 3)
    reduction = 2.0 if search.halving is None else search.halving.reduction
    steps = min(MOST_TRIAL_STEPS, max(2, math.ceil(reduction ** (rungs - 1))))
    batch = min(search.retrain.batch, SEQUENCES)
    everything = search.sampler.kind == "exhaustive"
    trials = feasible if everything else min(search.trials, feasible, max(TRIALS, search.fewest_kept))
    zero_shot = search.zero_shot if "zero_shot" in plan.stages else None
    if zero_shot is not None:
        trials = max(search.fewest_kept, min(trials, feasible - 1))  # else there is nothing to choose from
        few = {"shapes": min(zero_shot.shapes, SHAPES), "sequences": min(zero_shot.sequences, 2)}
        zero_shot = zero_shot.model_copy(update=few)
    keep = search.keep if search.keep == "ties" else min(search.keep, trials)
    retrain = search.retrain.model_copy(
        update={"tokens": steps * batch * length, "rungs": rungs, "batch": batch}
    )
    return search.model_copy(
        update={
            "space": space,
            "serving": None,
            "trials": trials,
            "keep": keep,
            "zero_shot": zero_shot,
            "retrain": retrain,
            "signal": choose_signal(plan.experiment, plan.teacher),
        }
    )


# --- Shapes ---------------------------------------------------------------------------------------------


def _shapes(plan: Plan, small: Architecture) -> list[Candidate]:
    """Of the small model, distinct: some of the plan's feasible ones scaled to it, or where those all fall
    together or cannot be cut, its neighbours with one axis a step shorter."""
    real = _evenly(plan.feasible, SHAPES)
    refusals = Refusals(plan.family, small, plan.experiment.cut)
    scaled = [_scaled(plan, small, row.candidate) for row in real]
    if plan.fixed is None:
        scaled += _neighbours(plan, small) if len(_cuttable(scaled, refusals)) < 2 else []
    if found := _cuttable(scaled, refusals):
        return found
    reason = next((refusals.of(shape) for shape in scaled), None) or "its space is empty"
    raise ConfigError(f"rehearsal: no shape can be cut from a small {plan.family.model_type}: {reason}")


def _cuttable(shapes: Sequence[Candidate], refusals: Refusals) -> list[Candidate]:
    return list(dict.fromkeys(shape for shape in shapes if refusals.of(shape) is None))


def _evenly(rows: Sequence[CandidateRow], count: int) -> list[CandidateRow]:
    if len(rows) <= count:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (count - 1))] for place in range(count)]


def _scaled(plan: Plan, small: Architecture, shape: Candidate) -> Candidate:
    """A shape of the model that is really cut as one of the small model: as many layers fewer, other axes in
    proportion, in steps that the family admits. An axis that keeps its size does so here."""
    whole, family = plan.start, plan.family

    def part(axis: str, step: int = 1) -> int:
        size, of, within = getattr(shape, axis), getattr(whole, axis), getattr(small, axis)
        if size == of or not of:
            return int(within)
        return min(within, max(step, step * round(size * within / of / step)))

    kv_heads = part("kv_heads")
    a_group = max(1, round(shape.heads / shape.kv_heads * small.heads_per_group / whole.heads_per_group))
    heads = min(small.heads, kv_heads * a_group)
    hidden = part("hidden", _step(heads, small.hidden))
    if _square(family, whole):
        hidden = heads * small.head_dim
    return Candidate(
        layers=max(1, small.layers - (whole.layers - shape.layers)),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        mlp=part("mlp", min(8, small.mlp or 1)),
        experts=max(small.active_experts, part("experts")) if small.experts else 0,
        expert_mlp=part("expert_mlp", min(8, small.expert_mlp or 1)),
    )


def _neighbours(plan: Plan, small: Architecture) -> list[Candidate]:
    """The small model with one of the named axes a step shorter."""
    whole = Candidate(**{axis: getattr(small, axis) for axis in SPACE_AXES})
    steps = {
        "layers": 1,
        "hidden": _step(small.heads, small.hidden),
        "mlp": min(8, small.mlp or 1),
        "expert_mlp": min(8, small.expert_mlp or 1),
        "experts": 1,
    }
    named = [axis for axis in steps if getattr(plan.experiment.searched.space, axis) is not None]
    return [replace(whole, **{axis: getattr(whole, axis) - steps[axis]}) for axis in named]


def _step(heads: int, hidden: int) -> int:
    """Hidden sizes are multiples of the heads, and of 8 where that leaves a choice."""
    both = math.lcm(heads, 8)
    return both if 2 * both <= hidden else heads


def _square(family: Family, arch: Architecture) -> bool:
    """Whether the family takes the size of a head as hidden / heads."""
    return family.attributes.derives_heads or family.square_heads or arch.long_rope


def _multiple(size: float, step: int) -> int:
    return step * max(1, round(size / step))
