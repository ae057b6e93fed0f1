"""The stock model's experts in autocast, against its own loop over experts, which autocast knows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_ray.weights.device import autocast
from minitron_ray.weights.model import initialized
from tests.contracts.networks import CONFIGS, IDS

CPU = torch.device("cpu")


class _Products(TorchDispatchMode):
    """The types of the operands of every grouped product."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "grouped_mm" in str(func):
            self.types |= {value.dtype for value in args if isinstance(value, Tensor) and value.ndim > 1}
        return func(*args, **(kwargs or {}))


def _step(
    implementation: str | None, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor], set[torch.dtype]]:
    """Logits and gradients of a network of experts, and the types of the grouped products."""
    model = initialized(CONFIGS["qwen3_moe"], seed=0)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    with _Products() as products, autocast(CPU, dtype):
        logits = model(IDS).logits.float()
        logits.square().mean().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if "experts" in name}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    return logits.detach(), gradients, products.types


def test_without_autocast_nothing_is_cast() -> None:
    ours, stock = _step(None, torch.float32), _step("grouped_mm", torch.float32)
    assert ours[2] == stock[2] == {torch.float32}
    assert torch.equal(ours[0], stock[0])
    assert all(torch.equal(ours[1][name], stock[1][name]) for name in stock[1])


def test_within_autocast_products_are_those_of_the_loop_over_experts() -> None:
    ours, stock = _step(None, torch.bfloat16), _step("eager", torch.bfloat16)
    exact = _step("eager", torch.float32)
    assert ours[2] == {torch.bfloat16}
    for found, usual, truth in [
        (ours[0], stock[0], exact[0]),
        *((ours[1][name], stock[1][name], exact[1][name]) for name in exact[1]),
    ]:
        # No further from float32 than the loop is, which rounds at the same places.
        assert 0 < (found - truth).norm() <= 1.5 * (usual - truth).norm()


def test_the_config_does_not_name_it() -> None:
    """The choice is one of the running model, and no attribute of a checkpoint."""
    config = initialized(CONFIGS["qwen3_moe"], seed=0).config
    assert not any("experts_implementation" in name for name in config.to_diff_dict())
