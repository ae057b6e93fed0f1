"""Mistral: Llama without biases, any hidden size beside its heads, and an optional sliding window."""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family
from minitron_ray.models.standard import (
    CARRIED,
    EMBEDDING,
    FINAL_NORM,
    GATED_MLP,
    INPUT_NORM,
    LM_HEAD,
    POST_ATTENTION_NORM,
    PROJECTIONS,
    TAPS,
)

FAMILY = Family(
    model_type="mistral",
    causal_lm="MistralForCausalLM",
    tensors=(
        EMBEDDING,
        INPUT_NORM,
        *PROJECTIONS,
        POST_ATTENTION_NORM,
        *GATED_MLP,
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
                "sliding_window",
            }
        ),
        flags={"tied": "tie_word_embeddings"},
        defaults={"num_key_value_heads": 8},
        required_values={"attention_bias": False, "mlp_bias": False},
    ),
)
