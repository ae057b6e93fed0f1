"""Memory by arithmetic, against what torch keeps for the backward pass of a real network."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minitron_ray.core.hardware import Hardware
from minitron_ray.distillation.engine import Engine
from minitron_ray.distillation.sharding import prepare_layer
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.models.cost import activation_bytes
from minitron_ray.models.families import family_of
from minitron_ray.plan import Layout, Memory
from minitron_ray.stages.hardware import layout_of
from minitron_ray.weights.headless import Headless, final_hidden
from tests.plan.test_costs import planned, stage

SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}


def kept_bytes(layers: int, bfloat16: bool, recompute: bool = False) -> int:
    """Bytes that autograd saves in a forward pass of 4 x 64 tokens, weights and their copies aside."""
    config = LlamaConfig(num_hidden_layers=layers, head_dim=32, vocab_size=64, use_cache=False, **SIZES)
    model = LlamaForCausalLM(config).train()
    for layer in model.model.layers:
        prepare_layer(layer, Engine(recompute=recompute))
    own = {tuple(parameter.shape) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) not in own and tuple(tensor.shape[::-1]) not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(64, (4, 64))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16),
    ):
        output = Headless(model)(ids, final_hidden)
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output.requires_grad
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_autograd_keeps(dtype: str) -> None:
    """Of a layer: the difference between three and two of them. A count a head and a norm is left out."""
    config = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 32, **SIZES}
    arch = family_of(config).read(config)
    measured = (kept_bytes(3, dtype == "bfloat16") - kept_bytes(2, dtype == "bfloat16")) / (4 * 64)
    assert activation_bytes(arch, dtype) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_layers_keep_their_inputs(dtype: str) -> None:
    """And the one that is computed again all that it keeps without."""
    config = {"model_type": "llama", "num_hidden_layers": 8, "vocab_size": 64, "head_dim": 32, **SIZES}
    arch, bfloat16 = family_of(config).read(config), dtype == "bfloat16"
    inputs = kept_bytes(3, bfloat16, recompute=True) - kept_bytes(2, bfloat16, recompute=True)
    whole = kept_bytes(3, bfloat16) - kept_bytes(2, bfloat16)
    planned = activation_bytes(arch, dtype, recompute=True)
    assert planned == pytest.approx((8 * inputs + whole) / (4 * 64), rel=0.01)


def memory(layout: Layout, precision: Literal["auto", "float32", "bfloat16"] = "bfloat16") -> Memory:
    plan = planned("15b_to_8b")
    return Memory(family=plan.family, length=4096, precision=precision, layout=layout)


def test_a_teacher_that_does_not_fit_is_scored_layer_by_layer() -> None:
    arch = planned("15b_to_8b").teacher
    states = 4 * 4096 * 6144 * 2
    whole = memory(Layout(memory=80 * 2**30)).scoring(arch, 1)
    assert whole == 2 * 15_628_775_424 + states
    layer, outside = 88_080_384 + 301_989_888 + 4 * 6144, 2 * 256_000 * 6144  # two biased norms a layer
    streamed = memory(Layout(memory=40 * 2**30)).scoring(arch, 1)
    assert streamed == pytest.approx(2 * (layer + outside) + states, rel=1e-4)
    assert memory(Layout(importance="streamed")).scoring(arch, 1) == streamed


def test_workers_share_a_student_but_not_the_teacher() -> None:
    plan = planned("15b_to_8b")
    one = stage(plan, "distill", layout=Layout(accelerator=True)).memory_bytes
    eight = stage(plan, "distill", layout=Layout(accelerator=True, workers=8)).memory_bytes
    assert one is not None and eight is not None
    state = 16 * max(row.parameters for row in plan.feasible)
    # Seven eighths of the state go; a layer, the embedding and the head come back whole.
    assert one - eight == pytest.approx(state * 7 / 8, rel=0.15)
    assert eight > 2 * 15_628_775_424


def test_of_a_range_of_workers_the_fewest_hold_most() -> None:
    plan = planned("15b_to_8b")
    ranged = layout_of(ClusterSettings(workers="2..8"), None)
    found, two = stage(plan, "distill", layout=ranged), stage(plan, "distill", layout=Layout(workers=2))
    assert found.memory_bytes == two.memory_bytes
    assert "spread over 2..8 workers" in found.what and "spread over 2 workers" in two.what


def test_auto_is_bfloat16_on_accelerators_only() -> None:
    arch = planned("15b_to_8b").teacher
    assert memory(Layout(), "auto").weights(arch) == 2 * memory(Layout(accelerator=True), "auto").weights(
        arch
    )


def test_one_worker_a_device() -> None:
    h100s = Hardware(name="h100", count=8, flops=4e14, memory=80 * 2**30, source="")
    assert Layout.on(h100s) == Layout(workers=8, trials_at_once=8, accelerator=True, memory=80 * 2**30)
    assert Layout.on(h100s, workers=2).workers == 2
    assert Layout.on(h100s, workers=(2, 2)) == Layout.on(h100s, workers=2)
    assert Layout.on(None) == Layout()
