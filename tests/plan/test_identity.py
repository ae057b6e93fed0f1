"""Fingerprints: every input changes them, and nothing else does, so that runs can share stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment
from minitron_ray.plan import (
    Inputs,
    experiment_fingerprint,
    make_plan,
    run_fingerprint,
    stage_fingerprint,
    stage_fingerprints,
)
from minitron_ray.plan import identity as module
from minitron_ray.weights.fetch import given_config
from tests.plan.conftest import MakePlan

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SHAPE = """
name: fixed
teacher: {path: ./teacher}
data: {source: {kind: files, path: t}, sequence_length: 32}
shape: {layers: 3, mlp: 64}
distill: {tokens: 16_384}
"""
FOUND = Inputs(teacher="t", data="d")


@pytest.fixture
def marks(make_tiny_plan: MakePlan) -> Any:
    """Fingerprints by stage of the fixed shape under `--set` options."""

    def of(*overrides: str, inputs: Inputs = FOUND) -> dict[str, str]:
        return stage_fingerprints(make_tiny_plan(SHAPE, *overrides), inputs)

    return of


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {stage for stage in one.keys() | other.keys() if one.get(stage) != other.get(stage)}


STUDENT = {"distill", "evaluate", "export"}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("name=other", set()),
        ("seed=1", STUDENT),
        ("shape.layers=2", STUDENT),
        ("cut.merge_heads=mean", STUDENT),
        ("distill.tokens=32k", STUDENT),
        ("export.dtype=float32", {"export"}),
        ("export.as=mistral", {"teacher", *STUDENT}),
        ("data.validation=8", {"teacher", *STUDENT}),
        ("data.calibration=8", {"importance", "teacher", *STUDENT}),
        ("importance.width={kind: activation, batch: mean}", {"importance", *STUDENT}),
        ("precision=float32", {"importance", "teacher", *STUDENT}),
    ],
)
def test_a_change_reaches_the_stages_that_read_it_and_no_other(
    marks: Any, override: str, stages: set[str]
) -> None:
    assert differing(marks(), marks(override)) == stages


def test_metrics_that_were_measured_together_share_the_scores_and_not_the_students(marks: Any) -> None:
    one, other = (
        marks(f"importance.width={{kind: activation, batch: {name}, gather: all}}") for name in ("mean", "l2")
    )
    assert differing(one, other) == STUDENT


def test_another_text_or_teacher_changes_every_stage(marks: Any) -> None:
    for inputs in (Inputs(teacher="t", data="e"), Inputs(teacher="u", data="d")):
        assert differing(marks(), marks(inputs=inputs)) == set(marks())


def test_documents_apart_are_another_experiment_and_joined_ones_the_one_they_were(
    make_tiny_plan: MakePlan,
) -> None:
    """What decides the stages' results is in the digest of the text, see `prepare`."""
    plain, joined, apart = (
        make_tiny_plan(SHAPE, *overrides)
        for overrides in ((), ("data.documents=joined",), ("data.documents=apart",))
    )
    assert "documents" not in plain.experiment.model_dump(mode="json")["data"]
    assert run_fingerprint(joined, FOUND) == run_fingerprint(plain, FOUND) != run_fingerprint(apart, FOUND)


def test_iterative_importance_is_another_for_each_shape(marks: Any) -> None:
    rounds = "importance.iterations=2"
    assert "importance" in differing(marks(rounds), marks(rounds, "shape.layers=2"))


def test_without_a_distillation_the_student_is_the_cut(marks: Any) -> None:
    assert set(marks()) - set(marks("distill=null")) == {"distill"}
    assert differing(marks("distill=null"), marks("distill=null", "shape.mlp=48")) == {"evaluate", "export"}


def test_baselines_are_another_stage_of_the_same_search(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "x.yaml"
    search = "{space: {layers: 3..4}, trials: 2, retrain: {tokens: 1k}}"
    path.write_text(
        SHAPE.replace("shape: {layers: 3, mlp: 64}", f"budget: {{parameters: 60k..100k}}\nsearch: {search}")
    )
    config = json.loads((tiny_llama / "config.json").read_text())
    one, two, turned = (
        stage_fingerprints(make_plan(load(path, Experiment, overrides)[0], config), FOUND)
        for overrides in (
            (),
            ("search.baselines=[random, scratch]",),
            ("search.baselines=[scratch, random]",),
        )
    )
    assert differing(one, two) == {"baselines"} and two == turned


def searched(tmp_path: Path, tiny_llama: Path, *overrides: str) -> dict[str, str]:
    """Fingerprints of a search and its distillation under `--set` options."""
    path = tmp_path / "x.yaml"
    search = "{space: {layers: 3..4}, trials: 2, retrain: {tokens: 1k}}"
    path.write_text(
        SHAPE.replace("shape: {layers: 3, mlp: 64}", f"budget: {{parameters: 60k..100k}}\nsearch: {search}")
    )
    config = json.loads((tiny_llama / "config.json").read_text())
    return stage_fingerprints(make_plan(load(path, Experiment, overrides)[0], config), FOUND)


def test_how_many_are_kept_changes_trials_only_where_they_are_halved(
    tmp_path: Path, tiny_llama: Path
) -> None:
    baselines, whole = "search.baselines=[scratch]", "search.halving=null"
    for kept in ("search.keep=2", "search.keep=ties"):
        all_trained = searched(tmp_path, tiny_llama, whole, baselines)
        assert differing(all_trained, searched(tmp_path, tiny_llama, whole, baselines, kept)) == STUDENT
        halved = searched(tmp_path, tiny_llama, baselines)
        other = searched(tmp_path, tiny_llama, baselines, kept)
        assert differing(halved, other) == {"search", "baselines", *STUDENT}
    alone = searched(tmp_path, tiny_llama, whole, "distill=null")
    assert differing(alone, searched(tmp_path, tiny_llama, whole, "distill=null", "search.keep=2")) == {
        "evaluate"
    }


def test_a_search_against_flops_is_another_at_another_length(tmp_path: Path, tiny_llama: Path) -> None:
    """All shapes are inside the budget; of a search for the loss alone the length decides nothing."""
    wide = ("budget={parameters: 10k..200k, at: {length: %d}}", "distill=null")
    for sampler, stages in (
        ("{kind: nsga2, against: flops}", {"search", "evaluate"}),
        ("{kind: tpe}", set()),
        ("{kind: nsga2, against: parameters}", set()),
    ):
        one, other = (
            searched(tmp_path, tiny_llama, wide[0] % length, wide[1], f"search.sampler={sampler}")
            for length in (32, 512)
        )
        assert differing(one, other) == stages


@pytest.mark.parametrize(
    ("baselines", "stages"), [("[random, scratch]", set()), ("[largest_first]", {"baselines"})]
)
def test_what_counts_as_large_is_of_the_baseline_that_asks(
    tmp_path: Path, tiny_llama: Path, baselines: str, stages: set[str]
) -> None:
    """Both budgets admit every shape, so that nothing else depends on which parameters count."""
    wide = ("budget.parameters=10k..200k", f"search.baselines={baselines}")
    one, other = (
        searched(tmp_path, tiny_llama, *wide, f"budget.count={count}") for count in ("total", "non_embedding")
    )
    assert differing(one, other) == stages


def test_the_fingerprint_follows_what_decides_the_result_only() -> None:
    def paper(*overrides: str) -> Experiment:
        return load(EXPERIMENTS / "15b_to_8b.yaml", Experiment, overrides)[0]

    config = given_config(paper().teacher.config, EXPERIMENTS)
    inline, seeded = paper("teacher.config=" + json.dumps(config)), paper("seed=1")
    assert experiment_fingerprint(paper()) == experiment_fingerprint(inline)
    assert experiment_fingerprint(paper()) != experiment_fingerprint(seeded)
    plan = make_plan(paper(), config or {})
    assert run_fingerprint(plan, FOUND) != run_fingerprint(plan, Inputs(teacher="t", data="e"))


def test_a_stages_fingerprint_follows_all_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    base: dict[str, Any] = {"stage": "search", "fields": {"a": 1}, "needs": ["x"], "data": "d"}
    changes = [{"fields": {"a": 2}}, {"needs": ["y"]}, {"data": "e"}, {"stage": "distill"}]
    marks = {stage_fingerprint(**base), *(stage_fingerprint(**(base | change)) for change in changes)}
    monkeypatch.setattr(module, "VERSIONS", {"search": 99})
    assert len({stage_fingerprint(**base), *marks}) == 6
