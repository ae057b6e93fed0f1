"""What a search makes small beside the loss, where it is for a front (`sampler: nsga2`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_ray.models.cost import forward_flops
from minitron_ray.plan import Plan


class Cost:
    """The second objective, of a candidate with a result or a row of `trials`.

    As the experiment's sampler says, also where there are trials enough to try every shape in order.
    """

    def __init__(self, plan: Plan) -> None:
        objectives = plan.experiment.searched.sampler.objectives
        self.name: str | None = next((name for name in objectives if name != "val_loss"), None)
        length = plan.experiment.data.sequence_length
        self._of: dict[str, float] = {}
        for row in plan.feasible:
            arch = row.candidate.architecture(plan.start)
            flops = self.name == "flops"
            self._of[row.candidate.id] = forward_flops(plan.family, arch, length) if flops else row.parameters

    def __call__(self, candidate_id: str, result: Mapping[str, Any]) -> float | None:
        """None where the search has one objective, or the latency was not measured."""
        if self.name is None:
            return None
        found: float | None = result["latency"] if self.name == "latency" else self._of[candidate_id]
        return found
