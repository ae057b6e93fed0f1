"""What every family's table must hold true of the stock transformers model, for tiny random networks.

A new family needs a line in CONFIGS; every test below then runs over it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from minitron_ray.models.architecture import Architecture
from minitron_ray.models.families import family_of, supported
from minitron_ray.models.family import Family
from minitron_ray.models.kept import Kept
from minitron_ray.weights.model import build, skeleton
from minitron_ray.weights.surgery import cut
from minitron_ray.weights.writing import write_checkpoint

TINY = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**TINY, "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0},
    "llama-tied": {**TINY, "model_type": "llama", "tie_word_embeddings": True},
    "llama-biased": {**TINY, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-one-group-a-head": {**TINY, "model_type": "llama", "num_key_value_heads": 6},
    "nemotron": {**TINY, "model_type": "nemotron", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "nemotron-tied-biased": {
        **TINY,
        "model_type": "nemotron",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
}


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    family: Family
    arch: Architecture
    weights: dict[str, torch.Tensor]

    def logits(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.Tensor:
        model = build(config, weights)
        ids = torch.arange(24).reshape(2, 12) * 5 % 64
        return model(input_ids=ids).logits

    def cut_logits(self, kept: Kept, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        student = cut(weights, self.family, self.arch, kept)
        config = self.family.student_config(self.config, kept.architecture(self.arch), kept)
        return self.logits(config, student)


@pytest.fixture(params=CONFIGS)
def case(request: pytest.FixtureRequest) -> Case:
    config = CONFIGS[request.param]
    family = family_of(config)
    arch = family.read(config)
    source = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=source) * 0.3 for name, shape in family.shapes(arch).items()
    }
    return Case(config, family, arch, weights)


def random_kept(arch: Architecture, seed: int) -> Kept:
    """Any selection whose hidden size is a multiple of its heads, as Llama's config demands."""
    source = random.Random(seed)

    def some(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(source.sample(range(size), count)))

    share = source.randint(1, arch.heads_per_group)
    heads = share * arch.kv_heads
    layers = some(arch.layers, source.randint(1, arch.layers))
    hidden = heads * source.randint(1, arch.hidden // heads)
    mlp = source.randint(1, arch.mlp)

    def some_heads() -> tuple[int, ...]:
        size = arch.heads_per_group
        return tuple(g * size + h for g in range(arch.kv_heads) for h in some(size, share))

    return Kept(
        layers=layers,
        hidden=some(arch.hidden, hidden),
        heads=tuple(some_heads() for _ in layers),
        mlp=tuple(some(arch.mlp, mlp) for _ in layers),
    )


def test_every_family_is_under_contract() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(supported())


def test_table_is_the_stock_model(case: Case) -> None:
    model = skeleton(case.config)
    stock = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert stock == case.family.shapes(case.arch)
    assert type(model).__name__ == case.family.causal_lm


@pytest.mark.parametrize("seed", range(5))
def test_count_is_the_stock_models(case: Case, seed: int) -> None:
    kept = random_kept(case.arch, seed)
    arch = kept.architecture(case.arch)
    model = skeleton(case.family.student_config(case.config, arch, kept))
    assert sum(parameter.numel() for parameter in model.parameters()) == case.family.parameters(arch)
    core = [
        p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name
    ]
    assert sum(core) == case.family.non_embedding_parameters(arch)
    assert case.family.read(case.family.student_config(case.config, arch, kept)) == arch


def test_places_and_taps_exist(case: Case) -> None:
    family, arch, model = case.family, case.arch, build(case.config, case.weights)
    for path in (family.backbone, family.decoder_layers, family.final_norm, family.embedding, family.lm_head):
        assert model.get_submodule(path) is not None
    assert len(model.get_submodule(family.decoder_layers)) == arch.layers
    sizes = {"mlp": arch.mlp, "heads": arch.heads * arch.head_dim, "hidden": arch.hidden}
    assert set(family.taps) == set(sizes)
    heard: dict[str, list[int]] = {axis: [] for axis in sizes}
    for axis, taps in family.taps.items():
        for module in (model.get_submodule(tap.at(layer)) for tap in taps for layer in range(arch.layers)):
            module.register_forward_hook(
                lambda _, args, out, axis=axis, side=taps[0].side: heard[axis].append(
                    (args[0] if side == "input" else out).shape[-1]
                )
            )
    model(input_ids=torch.arange(8)[None])
    for axis, taps in family.taps.items():
        assert heard[axis] == [sizes[axis]] * (len(taps) * arch.layers)


def test_full_shape_cut_is_bit_identical_and_owns_its_memory(case: Case) -> None:
    whole = cut(case.weights, case.family, case.arch, Kept.whole(case.arch))
    assert list(whole) == list(case.weights)
    for name, tensor in whole.items():
        assert torch.equal(tensor, case.weights[name])
        assert tensor.data_ptr() != case.weights[name].data_ptr()
    assert torch.equal(
        case.cut_logits(Kept.whole(case.arch), case.weights), case.logits(case.config, case.weights)
    )


def test_cutting_silent_units_changes_no_logit(case: Case) -> None:
    """Different MLP neurons and heads in every layer, and a whole layer, made silent and then cut."""
    kept = random_kept(case.arch, 3)
    kept = Kept(layers=kept.layers, hidden=tuple(range(case.arch.hidden)), heads=kept.heads, mlp=kept.mlp)
    silent = _silenced(case, kept)
    expected = case.logits(case.config, silent)
    assert_close(case.cut_logits(kept, silent), expected, rtol=1e-4, atol=1e-4)
    # The same cut of weights that are not silent does change them: the test can tell.
    assert not torch.allclose(
        case.cut_logits(kept, case.weights), case.logits(case.config, case.weights), atol=1e-2
    )


def test_two_cuts_equal_one(case: Case) -> None:
    outer = random_kept(case.arch, 1)
    between = outer.architecture(case.arch)
    inner = random_kept(between, 2)
    twice = cut(cut(case.weights, case.family, case.arch, outer), case.family, between, inner)
    once = cut(case.weights, case.family, case.arch, outer.then(inner))
    assert list(twice) == list(once)
    assert all(torch.equal(twice[name], once[name]) for name in once)


def test_stock_transformers_reloads_the_student(case: Case, tmp_path: Path) -> None:
    kept = random_kept(case.arch, 4)
    arch = kept.architecture(case.arch)
    config = case.family.student_config(case.config, arch, kept)
    student = cut(case.weights, case.family, case.arch, kept)
    write_checkpoint(tmp_path, student.items(), config, dtype="float32")
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert stock.num_parameters() == case.family.parameters(arch)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, build(config, student)(ids).logits)


def _silenced(case: Case, kept: Kept) -> dict[str, torch.Tensor]:
    """Weights with the outputs of all units outside `kept` at zero."""
    size = case.arch.head_dim
    silent = {name: tensor.clone() for name, tensor in case.weights.items()}
    for layer in range(case.arch.layers):
        out = silent[f"model.layers.{layer}.self_attn.o_proj.weight"]
        down = silent[f"model.layers.{layer}.mlp.down_proj.weight"]
        position = kept.layers.index(layer) if layer in kept.layers else None
        heads = () if position is None else kept.heads[position]
        neurons = () if position is None else kept.mlp[position]
        for head in set(range(case.arch.heads)) - set(heads):
            out[:, head * size : (head + 1) * size] = 0
        down[:, sorted(set(range(case.arch.mlp)) - set(neurons))] = 0
        if position is None:
            for name in ("self_attn.o_proj.bias", "mlp.down_proj.bias"):
                if (bias := silent.get(f"model.layers.{layer}.{name}")) is not None:
                    bias.zero_()
    return silent
