"""Fixed shapes: completed, counted, costed, and refused with the axis and both sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment
from minitron_ray.plan import Plan, distilled_tokens, make_plan
from minitron_ray.weights.model import skeleton

BASE = """
name: fixed
teacher: {path: ./teacher}
data: {source: {kind: files, path: t}, sequence_length: 32, calibration: 8, validation: 8}
"""
FIXED = BASE + "shape: {layers: 3, mlp: 64}\n"
SEARCH = (
    BASE + "budget: {parameters: 75k, tolerance: 10%}\nsearch: {space: {mlp: 48..96 by 16, layers: 3..4}}\n"
)


@pytest.fixture
def config(tiny_llama: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((tiny_llama / "config.json").read_text())
    return value


@pytest.fixture
def planned(tmp_path: Path, config: dict[str, Any]) -> Any:
    def of(text: str, *overrides: str, **changed: Any) -> Plan:
        (tmp_path / "x.yaml").write_text(text)
        return make_plan(load(tmp_path / "x.yaml", Experiment, overrides)[0], config | changed)

    return of


def test_the_shape_is_counted_as_stock_transformers_builds_it(planned: Any, config: dict[str, Any]) -> None:
    plan = planned(FIXED)
    assert plan.fixed is not None and plan.feasible == (plan.fixed,) and plan.limits is None
    candidate = plan.fixed.candidate
    assert (candidate.layers, candidate.hidden, candidate.heads, candidate.kv_heads, candidate.mlp) == (
        3, config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"], 64,
    )  # fmt: skip
    built = skeleton(config | {"num_hidden_layers": 3, "intermediate_size": 64})
    assert plan.fixed.parameters == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("{mlp: 97}", r"^shape\.mlp: 97 is larger than the teacher's 96; .* give 96 or less$"),
        ("{layers: 5}", r"^shape\.layers: 5 is larger than the teacher's 4"),
        ("{experts: 2}", r"^shape\.experts: llama has no experts to cut; it has layers, hidden"),
        ("{heads: 4}", r"^shape: 4L 48H 4h/3 96m can't be cut .*: 4 heads do not divide into 3 KV groups"),
        (
            "{hidden: 40}",
            r"needs hidden to be a multiple of heads, 40 is none of 6; .*export: \{as: mistral\}",
        ),
    ],
)
def test_a_shape_that_cannot_be_cut_is_named(planned: Any, shape: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(BASE + f"shape: {shape}\n")


def test_another_model_type_takes_the_shape(planned: Any) -> None:
    text = BASE + "shape: {hidden: 40}\n"
    plan = planned(text, "export.as=mistral")
    assert plan.family.model_type == plan.config["model_type"] == "mistral"
    assert plan.candidate(plan.fixed.candidate.id).hidden == 40
    with pytest.raises(
        ConfigError, match=r"^export\.as: a llama can't be written as 'gemma2'; .* as mistral"
    ):
        planned(text, "export.as=gemma2")
    with pytest.raises(ConfigError, match=r"^export\.as: .*attention_bias = true"):
        planned(text, "export.as=mistral", attention_bias=True)


def test_merging_more_than_half_of_the_heads_is_refused(planned: Any) -> None:
    text = BASE + "shape: {heads: 1, kv_heads: 1}\ncut: {merge_heads: mean, kv_groups: mean}\n"
    with pytest.raises(ConfigError, match="at most half of 6 can go, not 5"):
        planned(text)


@pytest.mark.parametrize(
    ("text", "overrides", "stages"),
    [
        (FIXED, (), ["evaluate", "export"]),
        (FIXED, ("distill={tokens: 1k}",), ["distill", "evaluate", "export"]),
        (SEARCH, (), ["search", "evaluate"]),
        (SEARCH, ("distill={tokens: 1k}",), ["search", "distill", "evaluate", "export"]),
    ],
)
def test_only_the_stages_that_are_needed(
    planned: Any, text: str, overrides: tuple[str, ...], stages: list[str]
) -> None:
    plan = planned(text, *overrides)
    assert list(plan.stages) == ["prepare", "importance", "teacher", *stages]
    assert [cost.stage for cost in plan.costs()] == [s for s in plan.stages if s != "prepare"]


def test_the_teacher_is_run_over_validation_alone_where_nothing_is_searched(planned: Any) -> None:
    plan = planned(FIXED, "distill={tokens: 1000, batch: 4}")
    tokens = {cost.stage: cost.tokens for cost in plan.costs()}
    # 1000 tokens are eight steps of 4 x 32.
    assert tokens == {"importance": 256, "teacher": 256, "distill": 1024, "evaluate": 256 * 3, "export": 0}
    assert distilled_tokens(plan.experiment) == 1024 and plan.trials == 0
    assert distilled_tokens(planned(FIXED).experiment) == 0
