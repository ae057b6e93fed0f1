"""When undistilled cuts are scored, and on what their scores depend."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from minitron_ray.core.errors import ConfigError
from minitron_ray.plan import Inputs, stage_fingerprints
from minitron_ray.plan.plan import Plan
from tests.plan.conftest import MakePlan

SEARCH = """
name: searched
teacher: {path: ./teacher}
data: {source: {kind: files, path: t}, sequence_length: 32}
budget: {parameters: 60k..100k}
search: {space: {layers: 2..4, mlp: 48..96 by 16}, trials: 3, retrain: {tokens: 1k}}
"""


@pytest.fixture
def planned(make_tiny_plan: MakePlan) -> Any:
    return partial(make_tiny_plan, SEARCH)


def marks(plan: Plan) -> dict[str, str]:
    return stage_fingerprints(plan, Inputs(teacher="t", data="d"))


def test_cuts_are_scored_between_teacher_and_search(planned: Any) -> None:
    plan = planned()
    assert len(plan.feasible) > 3
    place = plan.stages.index("zero_shot")
    assert plan.stages[place - 1 : place + 2] == ("teacher", "zero_shot", "search")
    assert "zero_shot" in marks(plan)


@pytest.mark.parametrize(
    "override",
    [
        "search.trials=99",  # every shape is tried
        "search.zero_shot=null",
        "search.sampler={kind: random}",
        "search.sampler={kind: nsga2, against: flops}",
    ],
)
def test_cuts_are_not_scored_where_nothing_is_made_of_it(planned: Any, override: str) -> None:
    plan = planned(override)
    assert "zero_shot" not in plan.stages and "zero_shot" not in marks(plan)


@pytest.mark.parametrize(
    "override",
    ["search.zero_shot={shapes: 2}", "search.zero_shot={sequences: 2}", "seed=1", "data.calibration=8"],
)
def test_other_scores_are_another_search(planned: Any, override: str) -> None:
    one, other = marks(planned()), marks(planned(override))
    assert one["zero_shot"] != other["zero_shot"] and one["search"] != other["search"]


def test_more_trials_leave_the_scores_as_they_are(planned: Any) -> None:
    one, other = marks(planned()), marks(planned("search.trials=4"))
    assert one["zero_shot"] == other["zero_shot"] and one["search"] != other["search"]


def test_exhaustive_asks_for_as_many_trials_as_shapes(planned: Any) -> None:
    exhaustive = "search.sampler={kind: exhaustive}"
    shapes = len(planned().feasible)
    with pytest.raises(
        ConfigError, match=rf"search\.trials: 3 trials .* {shapes} shapes .*set trials to {shapes}"
    ):
        planned(exhaustive)
    assert planned(exhaustive, f"search.trials={shapes}").trials == shapes
