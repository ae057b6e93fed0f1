"""What a search makes small beside the loss, where it is for a front (`sampler: nsga2`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from minitron_ray.core.errors import ConfigError
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.experiment import Experiment
from minitron_ray.plan import Plan


def check_objectives(experiment: Experiment, settings: ClusterSettings) -> None:
    """Before anything is computed. Raises ConfigError where a trial can't measure what the sampler is to make small."""
    search, workers = experiment.search, settings.trial_workers
    if search is not None and "latency" in search.sampler.objectives and workers > 1:
        raise ConfigError(
            f"search.sampler.against: latency is timed on one device, and the cluster file has {workers} "
            f"trial_workers; choose flops or parameters"
        )


class Cost:
    """The second objective, of a candidate with a result or a row of `trials`.

    As the experiment's sampler says, also where there are trials enough to try every shape in order.
    """

    def __init__(self, plan: Plan) -> None:
        objectives = plan.experiment.searched.sampler.objectives
        self.name: str | None = next((name for name in objectives if name != "val_loss"), None)
        flops = self.name == "flops"  # at the length that the budget counts them for
        self._of: dict[str, float] = {
            row.candidate.id: row.flops_per_token if flops else row.parameters for row in plan.feasible
        }

    def __call__(self, candidate_id: str, result: Mapping[str, Any]) -> float | None:
        """None where the search has one objective, or the latency was not measured."""
        if self.name is None:
            return None
        found: float | None = result["latency"] if self.name == "latency" else self._of[candidate_id]
        return found


def first_costs(
    rows: Iterable[Mapping[str, Any]], cost: Callable[[str, Mapping[str, Any]], float | None]
) -> dict[str, float]:
    """By candidate, of rows of `trials`, the cost at the first rung that was measured: a trial that is taken up at a
    rung measures its latency once more, which counts for nothing."""
    found: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: int(row["rung"])):
        name = row["candidate_id"]
        measured = row["val_loss"] is not None and name not in found
        if measured and (value := cost(name, row)) is not None:
            found[name] = value
    return found
