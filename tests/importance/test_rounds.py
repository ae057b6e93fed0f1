"""The paper's schedule of iterative importance, and what one ranking makes of several rounds."""

from __future__ import annotations

import numpy as np
import pytest

from minitron_ray.experiment import Importance
from minitron_ray.importance.rounds import joined, schedule
from minitron_ray.importance.units import UnitScores
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.families import family_of
from minitron_ray.models.kept import Kept
from minitron_ray.search.rounds import round_shapes
from minitron_ray.search.selection import select
from minitron_ray.search.shape import shape_of
from tests.contracts.networks import Case


def test_the_papers_schedule() -> None:
    assert schedule(6144, 4096, 4) == (5632, 5120, 4608, 4096)
    assert schedule(6144, 4096, 2) == (5120, 4096)
    assert schedule(6144, 4096, 1) == (4096,)
    assert schedule(10, 10, 3) == (10, 10, 10)
    assert schedule(10, 7, 2) == (9, 7)  # never more than a round's share


NEMOTRON = Architecture(
    family="nemotron",
    layers=32,
    hidden=6144,
    heads=48,
    kv_heads=8,
    head_dim=128,
    mlp=24576,
    vocab=256_000,
)


def test_rounds_go_to_the_smallest_student_in_sizes_that_can_be_built() -> None:
    family = family_of({"model_type": "nemotron"})
    sizes = {"hidden": 4096, "heads": 24, "mlp": 16384}
    students = [shape_of(NEMOTRON, sizes), shape_of(NEMOTRON, sizes | {"heads": 48, "layers": 16})]
    shapes = round_shapes(family, NEMOTRON, students, 4)
    assert [shape.hidden for shape in shapes] == [5632, 5120, 4608]
    assert [shape.heads for shape in shapes] == [48, 40, 32]  # 42, 36 and 30 are no multiples of 8
    assert [shape.mlp for shape in shapes] == [22528, 20480, 18432]
    assert {shape.layers for shape in shapes} == {32}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "llama-one-group-a-head"])
def test_every_rounds_shape_can_be_built(name: str) -> None:
    case = Case.of(name)
    axes = {"heads": 3 if case.per_head else 4, "hidden": 24}
    axes |= {"experts": 3, "expert_mlp": 10} if case.arch.experts else {"mlp": 10}
    student = shape_of(case.arch, axes)
    before = shape_of(case.arch, {})
    for shape in round_shapes(case.family, case.arch, [student], 4):
        assert not case.family.problems(shape.architecture(case.arch))
        for axis in axes:
            assert getattr(student, axis) <= getattr(shape, axis) <= getattr(before, axis)
        before = shape
    assert before != shape_of(case.arch, {})


def random_scores(arch: Architecture, seed: int) -> UnitScores:
    draw = np.random.default_rng(seed).random
    experts = {"experts": (4, arch.experts), "expert_mlp": (4, arch.experts, arch.expert_mlp)}
    more = experts if arch.experts else {"mlp": (4, arch.mlp)}
    return UnitScores(
        hidden=draw(arch.hidden),
        heads=draw((4, arch.heads)),
        kv_heads=draw((4, arch.kv_heads)),
        **{axis: draw(shape) for axis, shape in more.items()},
    )


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "llama-one-group-a-head"])
def test_who_went_earlier_ranks_lower_and_survivors_by_their_last_score(name: str) -> None:
    case = Case.of(name)
    teacher, whole = case.arch, Kept.whole(case.arch)
    first = random_scores(teacher, 0)
    sizes = {"hidden": 30, "heads": 3 if case.per_head else 4}
    sizes |= {"experts": 4, "expert_mlp": 12} if teacher.experts else {"mlp": 12}
    shape = shape_of(teacher, sizes)
    layers = {1: np.zeros(4)}
    kept = select(first.with_layers(layers), shape, teacher)
    last = random_scores(kept.architecture(teacher), 1)
    scores = joined([(whole, first), (kept, last)], teacher)

    gone = sorted(set(range(teacher.hidden)) - set(kept.hidden))
    assert scores.hidden[gone].max() < scores.hidden[list(kept.hidden)].min()
    by_score = np.argsort(scores.hidden, kind="stable")
    assert by_score[: len(gone)].tolist() == sorted(gone, key=lambda unit: first.hidden[unit])
    assert by_score[len(gone) :].tolist() == [kept.hidden[unit] for unit in np.argsort(last.hidden)]
    # What a second cut keeps is what the last round would have kept of what was left.
    smaller = shape_of(teacher, {axis: size if axis == "heads" else size - 3 for axis, size in sizes.items()})
    inner = select(last.with_layers(layers), smaller, kept.architecture(teacher))
    assert select(scores.with_layers(layers), smaller, teacher) == kept.then(inner, teacher)


def test_one_round_ranks_as_its_scores_do() -> None:
    case = Case.of("llama")
    first = random_scores(case.arch, 0)
    scores = joined([(Kept.whole(case.arch), first)], case.arch)
    for axis, values in first.axes().items():
        np.testing.assert_array_equal(np.argsort(values, -1), np.argsort(getattr(scores, axis), -1))


def test_rounds_follow_one_metric_and_are_told_in_the_table() -> None:
    with pytest.raises(ValueError, match=r"rounds follow one metric and width\.gather is all"):
        Importance.model_validate({"width": {"kind": "activation", "gather": "all"}, "iterations": 2})
    assert Importance(iterations=3).width_label == "activation(batch=l2, sequence=mean), 3 rounds"
    assert Importance(iterations=3).identity != Importance().identity
