"""A corrected teacher on paper: what names it, who shares it, what it costs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.cost import forward_flops, training_flops
from minitron_ray.plan import Inputs, stage_fingerprints
from tests.plan.conftest import MakePlan

SHAPE = """
name: fixed
teacher: {path: ./teacher, correction: {tokens: 8192, batch: 4}}
data: {source: {kind: files, path: t}, sequence_length: 32, validation: 8}
shape: {layers: 3, mlp: 64}
distill: {tokens: 16_384}
"""
FOUND = Inputs(teacher="t", data="d")


@pytest.fixture
def planned(make_tiny_plan: MakePlan) -> Any:
    """The plan of the fixed shape under `--set` options."""
    return partial(make_tiny_plan, SHAPE)


def test_another_recipe_is_another_teacher_to_every_stage(planned: Any) -> None:
    marks = stage_fingerprints(planned(), FOUND)
    other = stage_fingerprints(planned("teacher.correction.learning_rate=1e-5"), FOUND)
    assert "correct" in marks and all(marks[stage] != other[stage] for stage in marks)
    plain = stage_fingerprints(planned("teacher.correction=null"), FOUND)
    assert "correct" not in plain and all(marks[stage] != plain[stage] for stage in plain)


@pytest.mark.parametrize(
    "override",
    ["name=other", "shape.layers=2", "distill.tokens=32k", "teacher.correction.validate_every=1024"],
)
def test_what_does_not_make_the_teacher_does_not_name_it(planned: Any, override: str) -> None:
    marks, other = (stage_fingerprints(planned(*o), FOUND) for o in ((), (override,)))
    assert marks["correct"] == other["correct"] and marks["importance"] == other["importance"]


def test_it_is_a_training_of_the_whole_teacher_and_made_once_in_a_command(planned: Any) -> None:
    plan = planned()
    [cost] = [cost for cost in plan.costs() if cost.stage == "correct"]
    # 64 steps of 4 x 32 tokens; measured before, and four times on the way.
    step, measured = (
        training_flops(plan.family, plan.teacher, 32),
        forward_flops(plan.family, plan.teacher, 32),
    )
    assert cost.tokens == 8192 and cost.flops == 8192 * step + 5 * 8 * 32 * measured
    assert cost.disk_bytes == plan.family.parameters(plan.teacher) * (3 * 12 + 4)
    assert plan.stages.index("correct") < plan.stages.index("importance")
    second = planned("name=second", "shape.layers=2")
    [again] = [cost for cost in second.costs(before=[plan]) if cost.stage == "correct"]
    assert again.tokens == 0 and "which fixed has done by then" in again.what
    other = planned("name=second", "seed=1")
    [again] = [cost for cost in other.costs(before=[plan]) if cost.stage == "correct"]
    assert again.tokens == 8192
    [signal] = [cost for cost in other.costs(before=[plan]) if cost.stage == "teacher"]
    assert signal.tokens, "the signal of another teacher does not count"


def test_a_correction_needs_tokens(planned: Any) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.correction\.tokens"):
        planned("teacher.correction={learning_rate: 1e-5}")
