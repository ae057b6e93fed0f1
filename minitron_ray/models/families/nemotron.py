"""Nemotron-4 and Minitron: plain MLP with squared ReLU, LayerNorm1P with bias, half-rotary positions.

LayerNorm1P stores γ - 1. Selecting channels commutes with that offset, so its tensors are cut like
any other (paper §7).
"""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import HIDDEN_TAPS, Family, Tap, Tensor

LAYER = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."
QUERIES, GROUPS = "heads*head_dim", "kv_heads*head_dim"

FAMILY = Family(
    model_type="nemotron",
    causal_lm="NemotronForCausalLM",
    tensors=(
        Tensor("model.embed_tokens.weight", ("vocab", "hidden")),
        Tensor(LAYER + "input_layernorm.weight", ("hidden",)),
        Tensor(LAYER + "input_layernorm.bias", ("hidden",)),
        Tensor(ATTENTION + "q_proj.weight", (QUERIES, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "k_proj.weight", (GROUPS, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "v_proj.weight", (GROUPS, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "o_proj.weight", ("hidden", QUERIES)),
        Tensor(ATTENTION + "q_proj.bias", (QUERIES,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "k_proj.bias", (GROUPS,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "v_proj.bias", (GROUPS,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "o_proj.bias", ("hidden",), needs="attention_bias"),
        Tensor(LAYER + "post_attention_layernorm.weight", ("hidden",)),
        Tensor(LAYER + "post_attention_layernorm.bias", ("hidden",)),
        Tensor(MLP + "up_proj.weight", ("mlp", "hidden")),
        Tensor(MLP + "down_proj.weight", ("hidden", "mlp")),
        Tensor(MLP + "up_proj.bias", ("mlp",), needs="mlp_bias"),
        Tensor(MLP + "down_proj.bias", ("hidden",), needs="mlp_bias"),
        Tensor("model.norm.weight", ("hidden",)),
        Tensor("model.norm.bias", ("hidden",)),
        Tensor("lm_head.weight", ("vocab", "hidden"), unless="tied"),
    ),
    taps={
        "mlp": (Tap(MLP + "down_proj", "input"),),
        "heads": (Tap(ATTENTION + "o_proj", "input"),),
        "hidden": HIDDEN_TAPS,
    },
    attributes=Attributes(
        carried=frozenset(
            {
                "hidden_act",
                "max_position_embeddings",
                "norm_eps",
                "rope_theta",
                "rope_scaling",
                "rope_parameters",
                "partial_rotary_factor",
                "attention_dropout",
            }
        ),
        aliases={
            "kv_channels": "head_dim",
            "rope_percent": "partial_rotary_factor",
            "rope_percentage": "partial_rotary_factor",
        },
        kv_heads_written=True,
    ),
)
