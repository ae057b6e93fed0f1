"""Llama: gated MLP, RMSNorm, rotary positions, grouped queries. Also SmolLM2 and Llama-3.1-Minitron."""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tensor
from minitron_ray.models.standard import (
    CARRIED,
    EMBEDDING,
    FINAL_NORM,
    GATED_MLP,
    INPUT_NORM,
    LM_HEAD,
    MLP,
    OPTIONAL_BIASES,
    POST_ATTENTION_NORM,
    PROJECTIONS,
    TAPS,
)

FAMILY = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    tensors=(
        EMBEDDING,
        INPUT_NORM,
        *PROJECTIONS,
        *OPTIONAL_BIASES,
        POST_ATTENTION_NORM,
        *GATED_MLP,
        Tensor(MLP + "gate_proj.bias", ("mlp",), needs="mlp_bias"),
        Tensor(MLP + "up_proj.bias", ("mlp",), needs="mlp_bias"),
        Tensor(MLP + "down_proj.bias", ("hidden",), needs="mlp_bias"),
        FINAL_NORM,
        LM_HEAD,
    ),
    taps=TAPS,
    attributes=Attributes(
        carried=CARRIED
        | frozenset(
            {
                "hidden_act",
                "rms_norm_eps",
            }
        ),
    ),
    # LlamaConfig refuses other sizes even with head_dim given.
    multiples=(("hidden", "heads"),),
    as_types={"mistral": {"sliding_window": None, "max_position_embeddings": 2048}},
)
