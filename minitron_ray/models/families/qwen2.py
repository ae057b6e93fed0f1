"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from minitron_ray.models.configuration import Attributes, late_sliding_window
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
    qkv_biases,
)

FAMILY = Family(
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    tensors=(
        EMBEDDING,
        INPUT_NORM,
        *PROJECTIONS,
        *qkv_biases(),
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
                "use_sliding_window",
                "sliding_window",
                "max_window_layers",
            }
        ),
        flags={"tied": "tie_word_embeddings"},
        defaults={"num_key_value_heads": 32},
        layer_types=late_sliding_window,
    ),
)
