"""When a search first stops trials, and whether their ranks can mean something by then."""

from __future__ import annotations

import math
from typing import Final

from minitron_ray.experiment import Experiment
from minitron_ray.plan.tokens import rung_tokens, steps

FEWEST_STEPS: Final = 5
"""Optimizer steps before the first halving, below which is warned. In the 135M to 90M run of results/LOG.md
ranks after 2 steps foretold those at the end no better than undistilled losses did (tau +0.47 both, 6
candidates), after 4 steps better (+0.73)."""


def first_halving(experiment: Experiment) -> int | None:
    """Optimizer steps of a trial before some are stopped; None where none is ever stopped."""
    search = experiment.search
    if search is None or search.halving is None or len(rungs := rung_tokens(experiment)) < 2:
        return None
    return rungs[0] // (search.retrain.batch * experiment.data.sequence_length)


def early_halving(experiment: Experiment) -> str | None:
    """One line where trials are stopped before their ranks mean much, or before their warmup is over."""
    first = first_halving(experiment)
    if first is None:
        return None
    retrain = experiment.searched.retrain
    whole = steps(retrain.tokens, retrain.batch, experiment.data.sequence_length)
    warmup = math.ceil(retrain.warmup * whole)
    if first >= FEWEST_STEPS and first >= warmup:
        return None
    fewest = max(FEWEST_STEPS, warmup)
    remedies = ["fewer search.retrain.rungs", "more search.retrain.tokens"]
    remedies += ["a smaller search.retrain.batch"] if retrain.batch > 1 else []
    return (
        f"the first halving comes after {steps_text(first)} of {whole}, when ranks say little of those at the "
        f"end (advised: {fewest} or more, warmup included): take {', '.join(remedies[:-1])} or {remedies[-1]}"
    )


def steps_text(count: int) -> str:
    """`1 optimizer step`, `5 optimizer steps`."""
    return f"{count} optimizer step{'s' if count != 1 else ''}"
