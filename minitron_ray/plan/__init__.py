"""An experiment and the teacher's `config.json` become a counted, costed, fingerprinted plan.

Arithmetic only: no tensor, no torch, no ray. `minitron-ray plan` prints it and stops; `run` starts
from it.
"""

from minitron_ray.plan.costs import StageCost
from minitron_ray.plan.identity import (
    Inputs,
    corrected,
    correction_fingerprint,
    experiment_fingerprint,
    run_fingerprint,
    stage_fingerprint,
    stage_fingerprints,
)
from minitron_ray.plan.memory import Layout, Memory
from minitron_ray.plan.plan import (
    Plan,
    StartConfig,
    check_same_model,
    largest_student,
    make_plan,
    stages_of,
)
from minitron_ray.plan.signal import SignalCost, choose_signal, signal_costs
from minitron_ray.plan.tokens import distilled_tokens, steps, tokens_seen

__all__ = [
    "Inputs",
    "Layout",
    "Memory",
    "Plan",
    "SignalCost",
    "StageCost",
    "StartConfig",
    "check_same_model",
    "choose_signal",
    "corrected",
    "correction_fingerprint",
    "distilled_tokens",
    "experiment_fingerprint",
    "largest_student",
    "make_plan",
    "run_fingerprint",
    "signal_costs",
    "stage_fingerprint",
    "stage_fingerprints",
    "stages_of",
    "steps",
    "tokens_seen",
]
