"""Rows, taps and attributes that many families share, under the names that Llama gave them.

A family's table is made of these and of what it does otherwise, in the order of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from minitron_ray.models.family import Flag, Tap, TapAxis, Tensor

LAYER: Final = "model.layers.{layer}."
ATTENTION: Final = LAYER + "self_attn."
MLP: Final = LAYER + "mlp."
QUERIES: Final = "heads*head_dim"
GROUPS: Final = "kv_heads*head_dim"

EMBEDDING: Final = Tensor("model.embed_tokens.weight", ("vocab", "hidden"))
FINAL_NORM: Final = Tensor("model.norm.weight", ("hidden",))
LM_HEAD: Final = Tensor("lm_head.weight", ("vocab", "hidden"), unless="tied")
INPUT_NORM: Final = Tensor(LAYER + "input_layernorm.weight", ("hidden",))
POST_ATTENTION_NORM: Final = Tensor(LAYER + "post_attention_layernorm.weight", ("hidden",))

PROJECTIONS: Final = (
    Tensor(ATTENTION + "q_proj.weight", (QUERIES, "hidden"), makes_heads=True),
    Tensor(ATTENTION + "k_proj.weight", (GROUPS, "hidden"), makes_heads=True),
    Tensor(ATTENTION + "v_proj.weight", (GROUPS, "hidden"), makes_heads=True),
    Tensor(ATTENTION + "o_proj.weight", ("hidden", QUERIES)),
)


def qkv_biases(needs: Flag | None = None) -> tuple[Tensor, ...]:
    """Biases of queries, keys and values; where `needs` is None, always there."""
    return (
        Tensor(ATTENTION + "q_proj.bias", (QUERIES,), needs=needs, makes_heads=True),
        Tensor(ATTENTION + "k_proj.bias", (GROUPS,), needs=needs, makes_heads=True),
        Tensor(ATTENTION + "v_proj.bias", (GROUPS,), needs=needs, makes_heads=True),
    )


OPTIONAL_BIASES: Final = (
    *qkv_biases("attention_bias"),
    Tensor(ATTENTION + "o_proj.bias", ("hidden",), needs="attention_bias"),
)
"""Of all four projections."""
HEAD_NORMS: Final = (
    Tensor(ATTENTION + "q_norm.weight", ("head_dim",)),
    Tensor(ATTENTION + "k_norm.weight", ("head_dim",)),
)
"""Over each query and key head by itself."""
GATED_MLP: Final = (
    Tensor(MLP + "gate_proj.weight", ("mlp", "hidden")),
    Tensor(MLP + "up_proj.weight", ("mlp", "hidden")),
    Tensor(MLP + "down_proj.weight", ("hidden", "mlp")),
)

HEAD_TAPS: Final = (Tap(ATTENTION + "o_proj", "input"),)
HIDDEN_TAPS: Final = (
    Tap(LAYER + "input_layernorm", "output"),
    Tap(LAYER + "post_attention_layernorm", "output"),
)
"""Both norms of every layer, where they stand before attention and MLP; the final norm is not heard,
as in the reference implementation."""
TAPS: Final[Mapping[TapAxis, tuple[Tap, ...]]] = MappingProxyType(
    {"mlp": (Tap(MLP + "down_proj", "input"),), "heads": HEAD_TAPS, "hidden": HIDDEN_TAPS}
)

CARRIED: Final = frozenset(
    {"max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "attention_dropout"}
)
"""Attributes of rotary positions and attention, which change the function but no shape."""
