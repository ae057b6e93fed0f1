"""An experiment and the teacher's `config.json` become a counted, costed, fingerprinted plan.

Arithmetic only: no tensor, no torch, no ray. `minitron-ray plan` prints it and stops; `run` starts
from it.
"""

from minitron_ray.plan.costs import (
    LARGEST_SIGNAL,
    StageCost,
    distilled_tokens,
    signal_bytes_a_token,
    steps,
    tokens_seen,
)
from minitron_ray.plan.identity import (
    Inputs,
    experiment_fingerprint,
    run_fingerprint,
    stage_fingerprint,
    stage_fingerprints,
)
from minitron_ray.plan.plan import Plan, check_same_model, make_plan, stages_of

__all__ = [
    "LARGEST_SIGNAL",
    "Inputs",
    "Plan",
    "StageCost",
    "check_same_model",
    "distilled_tokens",
    "experiment_fingerprint",
    "make_plan",
    "run_fingerprint",
    "signal_bytes_a_token",
    "stage_fingerprint",
    "stage_fingerprints",
    "stages_of",
    "steps",
    "tokens_seen",
]
