"""Counts over arrays equal the functions for one architecture, for every family."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from minitron_ray.models.architecture import CUT_AXES, Architecture
from minitron_ray.models.budget import Load
from minitron_ray.models.cost import forward_flops, serving_bytes
from minitron_ray.models.counting import count
from minitron_ray.models.families import family_of, supported

LOAD = Load(batch=3, length=17, dtype="float32")


def teacher_of(model_type: str) -> Architecture:
    family = family_of({"model_type": model_type})
    has = set(family.cut_axes)
    return Architecture(
        family=model_type,
        layers=5,
        hidden=48,
        heads=6,
        kv_heads=6 if "kv_heads" not in has else 3,
        head_dim=8,
        mlp=96 if "mlp" in has else 0,
        vocab=101,
        experts=4 if "experts" in has else 0,
        expert_mlp=20 if "expert_mlp" in has else 0,
        active_experts=2 if "experts" in has else 0,
        positions=33 if model_type == "gpt2" else 0,
    )


@pytest.mark.parametrize("model_type", supported())
@pytest.mark.parametrize("flags", [{}, {"tied": True}, {"attention_bias": True, "mlp_bias": True}])
def test_every_shape_is_counted_as_by_itself(model_type: str, flags: dict[str, bool]) -> None:
    family, teacher = family_of({"model_type": model_type}), replace(teacher_of(model_type), **flags)
    choices = {axis: sorted({getattr(teacher, axis), getattr(teacher, axis) // 2}) for axis in CUT_AXES}
    shapes = [dict(zip(choices, sizes, strict=True)) for sizes in itertools.product(*choices.values())]
    columns = {axis: np.array([shape[axis] for shape in shapes]) for axis in CUT_AXES}
    counts = count(family, teacher, columns, LOAD)
    for place, shape in enumerate(shapes):
        arch = teacher.with_sizes(**shape)
        assert counts.parameters[place] == family.parameters(arch)
        assert counts.non_embedding_parameters[place] == family.non_embedding_parameters(arch)
        assert counts.memory_bytes[place] == serving_bytes(family, arch, "float32", batch=3, length=17)
        assert counts.flops_per_token[place] == forward_flops(family, arch, 17)


def test_axes_that_are_not_given_keep_the_teachers_size() -> None:
    family, teacher = family_of({"model_type": "llama"}), teacher_of("llama")
    counts = count(family, teacher, {"mlp": np.array([32, 96])}, LOAD)
    assert counts.parameters[1] == family.parameters(teacher)
    assert counts.parameters[0] == family.parameters(teacher.with_sizes(mlp=32))


def test_memory_is_weights_and_keys_and_values() -> None:
    """Llama-2 7B: 4,096 tokens of keys and values in float16 take 2 GiB, by 0.5 MiB a token."""
    family = family_of({"model_type": "llama"})
    arch = family.read(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32000,
        }
    )
    weights = 2 * 6_738_415_616
    assert serving_bytes(family, arch, "float16", batch=1, length=4096) == weights + 2 * 2**30
    assert serving_bytes(family, arch, "float16", batch=8, length=4096) == weights + 16 * 2**30
