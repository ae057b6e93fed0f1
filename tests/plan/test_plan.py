"""Plans: the paper's counts, costs by an independent formula, fingerprints, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_ray.cli.planning import plan_files
from minitron_ray.core.errors import ConfigError
from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment
from minitron_ray.plan import (
    Inputs,
    check_same_model,
    make_plan,
    stage_fingerprints,
)
from minitron_ray.weights.fetch import given_config

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def paper(name: str, *overrides: str) -> tuple[Experiment, dict[str, object]]:
    experiment, _ = load(EXPERIMENTS / f"{name}.yaml", Experiment, overrides)
    config = given_config(experiment.teacher.config, EXPERIMENTS)
    assert config is not None
    return experiment, config


def test_the_papers_first_compression() -> None:
    plan = make_plan(*paper("15b_to_8b"))
    assert plan.family.parameters(plan.teacher) == 15_628_775_424
    minitron = [
        row for row in plan.feasible
        if (row.candidate.layers, row.candidate.hidden, row.candidate.heads, row.candidate.mlp) == (32, 4096, 48, 16384)
    ]  # fmt: skip
    assert [row.parameters for row in minitron] == [8_271_699_968]
    assert len(plan.feasible) == 15 == plan.trials


def test_the_papers_second_compression() -> None:
    [(_, plan)] = plan_files([EXPERIMENTS / "8b_to_4b.yaml"], Path("no-results"), ())
    assert plan.family.parameters(plan.teacher) == 15_628_775_424
    assert plan.family.parameters(plan.start) == 8_271_699_968
    assert len(plan.feasible) == 18
    assert max(row.parameters for row in plan.feasible) == 4_190_509_056


def test_costs_are_the_usual_arithmetic() -> None:
    """6 N D for training and 2 N D for the teacher, without attention, within a tenth."""
    plan = make_plan(*paper("15b_to_8b"))
    distill = next(cost for cost in plan.costs() if cost.stage == "distill")
    assert distill.flops == pytest.approx(94e9 * (6 * 8.3e9 + 2 * 15.6e9), rel=0.1)


def test_a_budget_out_of_reach_names_the_range() -> None:
    with pytest.raises(ConfigError, match=r"no shape of search.space has .*the space reaches .*B .* to .*B"):
        make_plan(*paper("15b_to_8b", "budget.parameters=1B"))


def test_sequences_longer_than_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="8192 is longer than the teacher's context of 4096"):
        make_plan(*paper("15b_to_8b", "data.sequence_length=8192"))


def test_more_students_than_trials_are_refused() -> None:
    """Than are asked for, or than there are shapes."""
    with pytest.raises(ConfigError, match="99 students cannot be kept of 15 trials"):
        paper("15b_to_8b", "search.keep=99")
    with pytest.raises(ConfigError, match=r"16 students cannot be kept of 15 trials \(15 shapes"):
        make_plan(*paper("15b_to_8b", "search.keep=16", "search.trials=20"))


def test_students_lose_their_layers_by_one_rule() -> None:
    make_plan(*paper("15b_to_8b", "importance.depth.blocks=[3, 2]"))
    with pytest.raises(
        ConfigError, match=r"blocks of 2 layers are scored, .* 29 layers lose 3; write \[2, 3\]"
    ):
        make_plan(*paper("15b_to_8b", "importance.depth.blocks=[2]"))
    with pytest.raises(ConfigError, match="a block of 32 layers cannot go from a teacher of 32"):
        make_plan(*paper("15b_to_8b", "importance.depth.blocks=[2, 3, 32]"))


def test_the_depth_of_the_smallest_student_decides_how_many_layers_are_ranked_one_by_one() -> None:
    inputs = Inputs(teacher="t", data="d")

    def mark(*overrides: str) -> str:
        plan = make_plan(*paper("15b_to_8b", "importance.depth.kind=perplexity", *overrides))
        return stage_fingerprints(plan, inputs)["importance"]

    deep = "search.space.layers=31..32"
    assert mark() == mark(deep)
    assert mark("importance.depth.iterative=true") != mark("importance.depth.iterative=true", deep)


def test_an_unknown_family_is_named_with_those_supported() -> None:
    experiment, config = paper("15b_to_8b")
    with pytest.raises(ConfigError, match=r"'mamba' is not supported; supported are .*llama.*nemotron"):
        make_plan(experiment, config | {"model_type": "mamba"})


def test_a_config_of_another_network_is_refused() -> None:
    _, config = paper("15b_to_8b")
    check_same_model(config, config)
    with pytest.raises(ConfigError, match=r"correct teacher\.config or leave it out"):
        check_same_model(config | {"hidden_size": 4096}, config)
