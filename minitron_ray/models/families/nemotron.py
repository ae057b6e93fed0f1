"""Nemotron-4 and Minitron: plain MLP with squared ReLU, LayerNorm1P with bias, half-rotary positions.

LayerNorm1P stores γ - 1. Selecting channels commutes with that offset, so its tensors are cut like
any other (paper §7).
"""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tensor
from minitron_ray.models.standard import (
    CARRIED,
    EMBEDDING,
    FINAL_NORM,
    INPUT_NORM,
    LAYER,
    LM_HEAD,
    MLP,
    OPTIONAL_BIASES,
    POST_ATTENTION_NORM,
    PROJECTIONS,
    TAPS,
)

FAMILY = Family(
    model_type="nemotron",
    causal_lm="NemotronForCausalLM",
    tensors=(
        EMBEDDING,
        INPUT_NORM,
        Tensor(LAYER + "input_layernorm.bias", ("hidden",)),
        *PROJECTIONS,
        *OPTIONAL_BIASES,
        POST_ATTENTION_NORM,
        Tensor(LAYER + "post_attention_layernorm.bias", ("hidden",)),
        Tensor(MLP + "up_proj.weight", ("mlp", "hidden")),
        Tensor(MLP + "down_proj.weight", ("hidden", "mlp")),
        Tensor(MLP + "up_proj.bias", ("mlp",), needs="mlp_bias"),
        Tensor(MLP + "down_proj.bias", ("hidden",), needs="mlp_bias"),
        FINAL_NORM,
        Tensor("model.norm.bias", ("hidden",)),
        LM_HEAD,
    ),
    taps=TAPS,
    attributes=Attributes(
        carried=CARRIED
        | frozenset(
            {
                "hidden_act",
                "norm_eps",
                "partial_rotary_factor",
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
