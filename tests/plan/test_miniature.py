"""Miniatures of experiments: small, of the same family, and with the same stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_ray.cli.planning import plan_files
from minitron_ray.models.families import family_of
from minitron_ray.plan import Plan, StartConfig, make_plan
from minitron_ray.plan.miniature import (
    DISTILL_STEPS,
    LENGTH,
    MOST_TRIAL_STEPS,
    SEQUENCES,
    Vocabulary,
    lost_layers,
    small_config,
    small_experiment,
)
from minitron_ray.weights.model import skeleton
from tests.models.test_published import PUBLISHED

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BYTES = Vocabulary(size=320, end=256)


def real(*names: str, overrides: tuple[str, ...] = ()) -> list[Plan]:
    files = [EXPERIMENTS / f"{name}.yaml" for name in names]
    return [plan for _, plan in plan_files(files, Path("no-results"), overrides)]


def miniature(plan: Plan, spare: int | None = None) -> Plan:
    """As it is planned once models of small configs are there."""
    spare = lost_layers(plan) if spare is None else spare
    config = small_config(plan.family, plan.start_config, spare, BYTES)
    sized = small_experiment(plan, plan.family.read(config))
    start = None if sized.start is None else StartConfig(config=config, source="a stand-in")
    return make_plan(sized, config, start)


@pytest.mark.parametrize(
    "name",
    [
        *("quickstart", "15b_to_8b", "8b_to_4b", "smollm2_135m_to_90m", "smollm2_135m_to_110m"),
        "smollm2_110m_to_90m",
    ],
)
def test_every_experiment_has_a_small_one_with_the_same_stages(name: str) -> None:
    plan = real("smollm2_135m_to_110m", name)[-1] if name == "smollm2_110m_to_90m" else real(name)[-1]
    small = miniature(plan)
    assert small.stages == plan.stages
    assert small.family.parameters(small.start) < min(12e6, plan.family.parameters(plan.start) / 10)
    assert len(small.feasible) >= 2 and 1 <= small.trials <= 3
    step = SEQUENCES * LENGTH
    assert small.experiment.searched.retrain.tokens <= MOST_TRIAL_STEPS * step
    assert small.experiment.distill is None or small.experiment.distill.tokens <= DISTILL_STEPS * step
    assert sum(cost.flops for cost in small.costs()) < 1e-3 * sum(cost.flops for cost in plan.costs())


def test_what_decides_the_way_stays() -> None:
    [plan] = real("15b_to_8b")
    small, there = miniature(plan).experiment, plan.experiment
    assert small.importance == there.importance and small.cut == there.cut and small.export == there.export
    assert small.distill is not None and there.distill is not None
    assert small.distill.loss == there.distill.loss
    assert small.distill.learning_rate == there.distill.learning_rate
    assert small.searched.sampler == there.searched.sampler
    # 1.8B tokens of final hidden states are too many to store, 1,024 tokens are not: the kind stays.
    assert small.searched.signal.kind == "sampled"


def test_layers_go_as_in_the_real_plan() -> None:
    """As many of them, and as blocks where blocks are scored."""
    blocks = ("importance.depth={kind: perplexity, blocks: [2, 3]}", "search.space.layers=[29, 30]")
    [plan] = real("15b_to_8b", overrides=(*blocks, "search.trials=3", "budget.parameters=7.5B..8.9B"))
    small = miniature(plan)
    assert {small.start.layers - row.candidate.layers for row in small.feasible} <= {2, 3}
    assert plan.experiment.importance.depth.blocks == small.experiment.importance.depth.blocks


def test_a_fixed_shape_stays_one() -> None:
    fixed = ("budget=null", "search=null", "shape={layers: 31, mlp: 16384}")
    [plan] = real("15b_to_8b", overrides=fixed)
    small = miniature(plan)
    assert small.fixed is not None and small.experiment.shape is not None
    assert set(small.experiment.shape.sizes) == {"layers", "mlp"}
    assert small.fixed.candidate.layers == small.start.layers - 1
    assert small.fixed.candidate.mlp == pytest.approx(small.start.mlp * 16384 / 24576, abs=8)


def test_a_student_of_any_miniature_can_be_cut_again() -> None:
    first, second = real("15b_to_8b", "8b_to_4b")
    spare = lost_layers(first) + lost_layers(second)
    config = small_config(first.family, first.config, spare, BYTES)
    one = make_plan(small_experiment(first, first.family.read(config)), config)
    for row in one.feasible:
        arch = row.candidate.architecture(one.start)
        start = one.family.attributes.write(one.start_config, arch, one.family.causal_lm)
        again = small_experiment(second, arch)
        two = make_plan(again, config, StartConfig(config=start, source="a student"))
        assert len(two.feasible) >= 2, arch.shape_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_of_every_family_have_small_ones_that_transformers_builds(name: str) -> None:
    _, config = PUBLISHED[name]
    family = family_of(config)
    whole = family.read(config)
    small = small_config(family, config, 3, BYTES)
    arch = family.read(small)
    assert arch.layers == min(whole.layers, 7) and arch.head_dim == whole.head_dim and arch.vocab == 320
    built = sum(parameter.numel() for parameter in skeleton(small).parameters())
    assert built == family.parameters(arch) < 30e6
