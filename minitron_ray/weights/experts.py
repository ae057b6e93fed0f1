"""The stock model's experts with their products in the type of autocast.

Stock experts keep their matrices stacked, three dimensions each, and multiply them by `grouped_mm`, which
autocast does not know: it would run in float32, and so most of the network.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, nn

IMPLEMENTATION: Final = "grouped_mm_in_autocast"
"""The name under which transformers finds it, as `experts_implementation`."""


def register() -> None:
    """Makes it known to transformers, also more than once."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)


def _forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The routed output (tokens, hidden) of the hidden states (tokens, hidden), in the type of the products;
    `top_k_index` and `top_k_weights` (tokens, active experts) say which experts, and how much of each."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    kind, weights = hidden_states.device.type, experts
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        weights, hidden_states = cast("nn.Module", _Cast(experts, dtype)), hidden_states.to(dtype)
    output: Tensor = grouped_mm_experts_forward(weights, hidden_states, top_k_index, top_k_weights)
    return output


class _Cast:
    """Stock experts as they are, but for their weights, which are of another type."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, Tensor) else value
