"""Which units a student of a given shape keeps: the best-scored of the teacher's (paper §2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from minitron_ray.core.errors import ConfigError, MinitronError
from minitron_ray.core.kinds import Section
from minitron_ray.models.architecture import CUT_AXES, Architecture
from minitron_ray.models.kept import Indices, Kept
from minitron_ray.search import heads

if TYPE_CHECKING:
    from minitron_ray.importance.scores import Scores
    from minitron_ray.search.shape import Candidate

MergeRule = Literal["none", "paper", "laco", "mean"]


class CutRules(Section):
    """What becomes of the heads and KV groups that go (paper §2.1, §2.2)."""

    merge_heads: MergeRule = "none"
    """Merge each query head that goes into one that stays: 2 kept - dropped (`paper`), the dropped one
    (`laco`), or their mean. At most half of a KV group's heads can go."""
    kv_groups: Literal["drop", "mean"] = "drop"
    """Where the student has fewer KV groups: the lowest-scored go with their heads, or neighbours are
    averaged and their query heads ranked together."""


PLAIN: Final = CutRules()
"""Nothing merged, nothing averaged."""


def select(scores: Scores, candidate: Candidate, teacher: Architecture, rules: CutRules = PLAIN) -> Kept:
    """The best-scored units; among equals, the first.

    Layers: the lowest scores go; where blocks of as many layers as are to go were scored, the lowest
    block. Hidden channels: one ranking for the whole model, since the residual stream ties them
    together. All others: one ranking for each layer; heads as in `search.heads`, an expert's neurons
    inside that expert. An axis that keeps its size needs no scores.

    Raises MinitronError where a score is not finite, ConfigError where an axis to be cut was not
    scored or the rules cannot cut these heads, ValueError where scores and teacher do not fit.
    """
    _check(scores, candidate, teacher)
    if problem := heads.problem(candidate, teacher, rules):
        raise ConfigError(f"can't cut {candidate.shape_text()} from the teacher: {problem}")
    layers = _best_layers(scores, candidate.layers, teacher)
    groups = scores.kv_heads
    chosen = [
        heads.choose(
            scores.heads[layer], None if groups is None else groups[layer], candidate, teacher, rules
        )
        for layer in layers
    ]
    experts = _best_of_layers(scores.experts, candidate.experts, teacher.experts, layers)
    return Kept(
        layers=layers,
        hidden=_best(scores.hidden, candidate.hidden),
        heads=tuple(choice.heads for choice in chosen),
        mlp=_best_of_layers(scores.mlp, candidate.mlp, teacher.mlp, layers),
        kv_heads=_given(choice.groups for choice in chosen),
        experts=experts if candidate.experts < teacher.experts else (),
        expert_mlp=_best_expert_mlp(scores, candidate, teacher, layers, experts),
        merged_heads=_given(choice.blends for choice in chosen),
    )


def _best(scores: NDArray, count: int) -> Indices:
    """Indices of the `count` largest scores, ascending."""
    return tuple(sorted(heads.ranking(scores)[:count]))


def _best_layers(scores: Scores, count: int, teacher: Architecture) -> Indices:
    block = scores.blocks.get(teacher.layers - count)
    if block is None:
        return tuple(range(count)) if count == teacher.layers else _best(scores.layers, count)
    start = len(block) - 1 - int(np.argmin(block[::-1]))  # among equals, the first stays
    return (*range(start), *range(start + teacher.layers - count, teacher.layers))


def _best_of_layers(scores: NDArray | None, count: int, of: int, layers: Indices) -> tuple[Indices, ...]:
    """The best of the `of` units of each kept layer; nothing for an axis that the teacher does not have."""
    if of == 0:
        return ()
    if scores is None or count == of:
        return (tuple(range(of)),) * len(layers)
    return tuple(_best(scores[layer], count) for layer in layers)


def _best_expert_mlp(
    scores: Scores, candidate: Candidate, teacher: Architecture, layers: Indices, experts: Sequence[Indices]
) -> tuple[tuple[Indices, ...], ...]:
    """The best neurons of each kept expert; nothing where all of them stay."""
    values = scores.expert_mlp
    if values is None or candidate.expert_mlp == teacher.expert_mlp:
        return ()
    return tuple(
        tuple(_best(values[layer, expert], candidate.expert_mlp) for expert in row)
        for layer, row in zip(layers, experts, strict=True)
    )


def _given(rows: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    found = tuple(rows)
    return found if any(found) else ()


def _check(scores: Scores, candidate: Candidate, teacher: Architecture) -> None:
    for axis in CUT_AXES:
        count, of = getattr(candidate, axis), getattr(teacher, axis)
        if not min(1, of) <= count <= of:
            raise ValueError(f"{axis}: {count} of {of} units can't be kept")
    shapes: dict[str, tuple[int, ...]] = {
        "hidden": (teacher.hidden,),
        "heads": (teacher.layers, teacher.heads),
        "kv_heads": (teacher.layers, teacher.kv_heads),
        "mlp": (teacher.layers, teacher.mlp),
        "experts": (teacher.layers, teacher.experts),
        "expert_mlp": (teacher.layers, teacher.experts, teacher.expert_mlp),
    }
    for name, shape in shapes.items():
        values: NDArray | None = getattr(scores, name)
        if values is not None:
            _check_values(name, values, shape)
        elif name != "kv_heads" and getattr(candidate, name) < getattr(teacher, name):
            raise ConfigError(
                f"importance: {name} was not scored, so {getattr(candidate, name)} of "
                f"{getattr(teacher, name)} can't be chosen; take a width metric that scores {name}"
            )
    for length, values in scores.blocks.items():
        _check_values(f"blocks of {length} layers", values, (teacher.layers - length + 1,))
    _check_layers(scores, teacher.layers - candidate.layers, teacher)


def _check_layers(scores: Scores, dropped: int, teacher: Architecture) -> None:
    if not np.isnan(scores.layers).all():
        _check_values("layers", scores.layers, (teacher.layers,))
    elif dropped and dropped not in scores.blocks:
        lengths = ", ".join(map(str, sorted(scores.blocks)))
        found = f"only blocks of {lengths} layers were scored" if lengths else "layers were not scored"
        raise ConfigError(
            f"importance: {found}, but {dropped} of {teacher.layers} layers are to go; take a depth metric "
            f"that scores single layers, or blocks of {dropped}"
        )


def _check_values(axis: str, values: NDArray, shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise ValueError(f"importance scores of {axis} have shape {values.shape}, the teacher has {shape}")
    finite = np.isfinite(values)
    if not finite.all():
        where = ", ".join(map(str, np.argwhere(~finite)[0]))
        raise MinitronError(
            f"importance: the score of {axis} [{where}] is not a finite number, so units can't be "
            f"ranked; measure in float32 (precision: float32) or check the teacher's weights"
        )
