from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from minitron_ray.models.families import family_of
from minitron_ray.models.kept import Kept
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.surgery import cut, cut_tensors

KEPT = Kept(
    layers=(1, 3),
    hidden=(0, 5, 6, 7, 40, 41),
    heads=((0, 3, 5), (1, 2, 4)),
    mlp=((0, 95), (10, 11)),
)


def test_every_axis_by_hand(tiny_llama: Path) -> None:
    source = Checkpoint(tiny_llama)
    family = family_of(source.config)
    student = cut(source, family, family.read(source.config), KEPT)
    hidden = list(KEPT.hidden)
    take = source.tensor
    old, new = "model.layers.3.", "model.layers.1."
    heads = [head * 8 + i for head in (1, 2, 4) for i in range(8)]
    expected = {
        "model.embed_tokens.weight": take("model.embed_tokens.weight")[:, hidden],
        "model.norm.weight": take("model.norm.weight")[hidden],
        new + "input_layernorm.weight": take(old + "input_layernorm.weight")[hidden],
        new + "self_attn.q_proj.weight": take(old + "self_attn.q_proj.weight")[heads][:, hidden],
        new + "self_attn.k_proj.weight": take(old + "self_attn.k_proj.weight")[:, hidden],
        new + "self_attn.o_proj.weight": take(old + "self_attn.o_proj.weight")[hidden][:, heads],
        new + "mlp.gate_proj.weight": take(old + "mlp.gate_proj.weight")[[10, 11]][:, hidden],
        new + "mlp.down_proj.weight": take(old + "mlp.down_proj.weight")[hidden][:, [10, 11]],
    }
    for name, tensor in expected.items():
        assert torch.equal(student[name], tensor), name
        assert student[name].is_contiguous()
    assert torch.equal(
        student["model.layers.0.mlp.up_proj.weight"],
        take("model.layers.1.mlp.up_proj.weight")[[0, 95]][:, hidden],
    )
    assert {name: tuple(tensor.shape) for name, tensor in student.items()} == family.shapes(
        KEPT.architecture(family.read(source.config))
    )


def test_the_students_memory_is_its_own(tiny_llama: Path) -> None:
    source = Checkpoint(tiny_llama)
    family = family_of(source.config)
    arch = family.read(source.config)
    for kept in (Kept.whole(arch), KEPT):
        first, second = (cut(source, family, arch, kept) for _ in range(2))
        for name, tensor in first.items():
            tensor.fill_(-1)
            assert not torch.equal(second[name], tensor)
            assert not torch.equal(
                source.tensor(name)[:1, ...], torch.full_like(source.tensor(name)[:1, ...], -1)
            )


def test_conversion(tiny_llama: Path) -> None:
    source = Checkpoint(tiny_llama)
    family = family_of(source.config)
    arch = family.read(source.config)
    exact, half = cut(source, family, arch, KEPT), cut(source, family, arch, KEPT, dtype="bfloat16")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], exact[name].bfloat16()) for name in exact)


def test_what_does_not_fit_is_refused(tiny_llama: Path) -> None:
    source = Checkpoint(tiny_llama)
    family = family_of(source.config)
    arch = family.read(source.config)
    with pytest.raises(ValueError, match="hidden: indices"):
        cut(source, family, arch.with_sizes(hidden=36), KEPT)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(256, 48\), expected \(256, 60\)"):
        next(cut_tensors(source, family, arch.with_sizes(hidden=60), KEPT))


def test_merged_heads_and_averaged_kv_heads_by_hand(tiny_llama: Path) -> None:
    """Queries are 2 h_i - h_j, keys and values the mean of both groups; o_proj is only trimmed."""
    source = Checkpoint(tiny_llama)
    family = family_of(source.config)
    arch = family.read(source.config)
    blends = (((0, 2.0), (1, -1.0)), ((3, 1.0),), ((5, 0.5), (4, 0.5)))
    kept = replace(
        Kept.whole(arch),
        heads=((0, 3, 5),) * arch.layers,
        kv_heads=((tuple(range(arch.kv_heads)),),) * arch.layers,
        merged_heads=(blends,) * arch.layers,
    )
    student = cut(source, family, arch, kept)
    for layer in range(arch.layers):
        path = f"model.layers.{layer}.self_attn."
        queries = source.tensor(path + "q_proj.weight").unflatten(0, (arch.heads, arch.head_dim))
        merged = torch.stack([2 * queries[0] - queries[1], queries[3], (queries[4] + queries[5]) / 2])
        assert_close(student[path + "q_proj.weight"], merged.flatten(0, 1))
        for name in ("k_proj", "v_proj"):
            matrix = source.tensor(f"{path}{name}.weight").unflatten(0, (arch.kv_heads, arch.head_dim))
            assert_close(student[f"{path}{name}.weight"], matrix.mean(0))
        columns = [head * arch.head_dim + i for head in (0, 3, 5) for i in range(arch.head_dim)]
        assert torch.equal(student[path + "o_proj.weight"], source.tensor(path + "o_proj.weight")[:, columns])
