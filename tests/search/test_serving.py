"""Shapes that an engine could not serve are left out, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from minitron_ray.core.errors import ConfigError
from minitron_ray.experiment import Space
from minitron_ray.models.budget import Band, Limits
from minitron_ray.models.families import family_of
from minitron_ray.search.serving import KERNELS, SERVED_AXES, Serving
from minitron_ray.search.space import CandidateRow, enumerate_candidates

CONFIG = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
ANY = Limits.on(Band(low=1, high=10**12))


def rows(space: dict[str, Any], **serving: Any) -> list[CandidateRow]:
    family = family_of(CONFIG)
    return enumerate_candidates(
        family, family.read(CONFIG), Space.model_validate(space), ANY, serving=Serving(**serving)
    )


def reasons(space: dict[str, Any], **serving: Any) -> dict[int, str | None]:
    """By the size on the one axis of the space."""
    axis = next(iter(space))
    return {getattr(row.candidate, axis): row.reason for row in rows(space, **serving)}


def test_heads_and_mlp_divide_among_devices() -> None:
    assert reasons({"heads": [24, 32]}, tensor_parallel=16) == {
        24: "heads 24 does not divide among 16 devices (serving.tensor_parallel)",
        32: None,
    }
    assert reasons({"mlp": [9218, 9216]}, tensor_parallel=4) == {
        9218: "mlp 9218 does not divide among 4 devices (serving.tensor_parallel)",
        9216: None,
    }


def test_groups_divide_or_stand_on_equally_many_devices() -> None:
    serving = Serving(tensor_parallel=4)
    assert [groups for groups in range(1, 13) if serving.problem("kv_heads", groups, 128) is None] == [
        1, 2, 4, 8, 12
    ]  # fmt: skip
    assert "3 does not divide among 4 devices and do not divide them" in (
        serving.problem("kv_heads", 3, 128) or ""
    )


@pytest.mark.parametrize(
    ("serving", "good", "bad", "why"),
    [
        ({"kernels": ["int4"]}, 9216, 9280, "mlp 9280 is no multiple of 128 (serving.kernels: int4)"),
        ({"kernels": ["fp8"]}, 9232, 9224, "mlp 9224 is no multiple of 16 (serving.kernels: fp8)"),
        ({"kernels": ["fp8_block"]}, 9216, 9232, "mlp 9232 is no multiple of 128 (serving.kernels: fp8_block)"),
        ({"gguf": "k_quants"}, 9216, 9344, "mlp 9344 is no multiple of 256 (serving.gguf: k_quants)"),
        ({"gguf": "legacy"}, 9248, 9232, "mlp 9232 is no multiple of 32 (serving.gguf: legacy)"),
        (
            {"kernels": ["int4"], "tensor_parallel": 2},
            9216,
            9344,
            "mlp 9344, 4672 a device, is no multiple of 128 (serving.kernels: int4)",
        ),
    ],
)  # fmt: skip
def test_matrices_are_multiples(serving: dict[str, Any], good: int, bad: int, why: str) -> None:
    assert reasons({"mlp": [good, bad]}, **serving) == {good: None, bad: why}


def test_a_shape_is_served_where_every_matrix_of_each_device_fits() -> None:
    """Against the matrices of the layers, cut into shares as tensor parallelism does."""
    family, head_dim = family_of(CONFIG), 32
    teacher = family.read(CONFIG | {"head_dim": head_dim})
    space = {"hidden": "448..1024 by 32", "heads": [8, 16, 24], "mlp": "1024..1536 by 64"}
    found = enumerate_candidates(
        family,
        teacher,
        Space.model_validate(space),
        ANY,
        serving=Serving(kernels=("int4",), tensor_parallel=2),
    )
    rows_of, columns_of = KERNELS["int4"]
    for row in found:
        hidden, mlp, queries = row.candidate.hidden, row.candidate.mlp, row.candidate.heads * head_dim
        keys = row.candidate.kv_heads * head_dim
        column_parallel = [(hidden, queries // 2), (hidden, keys // 2), (hidden, mlp // 2)]
        row_parallel = [(queries // 2, hidden), (mlp // 2, hidden)]
        fits = all(
            inputs % rows_of == 0 and outputs % columns_of == 0
            for inputs, outputs in column_parallel + row_parallel
        )
        assert row.in_budget == fits, row
    assert {row.in_budget for row in found} == {True, False}


def test_a_shape_that_cannot_be_cut_says_that_first() -> None:
    assert reasons({"mlp": [9217, 14400, 14336]}, kernels=("int4",)) == {
        9217: "mlp 9217 is no multiple of 128 (serving.kernels: int4)",
        14400: "mlp 14400 is above the teacher's 14336",
        14336: None,
    }


def test_axes_that_a_model_does_not_have_are_not_asked() -> None:
    serving = Serving(tensor_parallel=7, kernels=tuple(KERNELS), gguf="k_quants")
    assert [serving.problem(axis, 0, 128) for axis in SERVED_AXES] == [None] * len(SERVED_AXES)


def test_a_space_of_which_nothing_is_served() -> None:
    told = (
        r"^search\.serving: none of the 2 shapes that can be cut is served, e\.g\. .* mlp 9217 is no multiple"
    )
    with pytest.raises(ConfigError, match=told):
        rows({"mlp": [9217, 9219]}, kernels=("fp8",))


@pytest.mark.parametrize(
    ("serving", "problem"),
    [
        ({"tensor_parallel": 0}, "greater than or equal to 1"),
        ({"kernels": ["int3"]}, "'int4', 'int8', 'fp8' or 'fp8_block'"),
        ({"kernels": ["fp8", "fp8"]}, "fp8 is named twice"),
        ({"gguf": "q4"}, "'k_quants' or 'legacy'"),
    ],
)
def test_what_serving_refuses(serving: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Serving.model_validate(serving)
