"""Qwen3: Llama with a norm over each query and key head; head_dim is 128 unless stated."""

from minitron_ray.models.configuration import Attributes, late_sliding_window
from minitron_ray.models.family import Family
from minitron_ray.models.standard import (
    CARRIED,
    EMBEDDING,
    FINAL_NORM,
    GATED_MLP,
    HEAD_NORMS,
    INPUT_NORM,
    LM_HEAD,
    OPTIONAL_BIASES,
    POST_ATTENTION_NORM,
    PROJECTIONS,
    TAPS,
)

FAMILY = Family(
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    tensors=(
        EMBEDDING,
        INPUT_NORM,
        *PROJECTIONS,
        *OPTIONAL_BIASES,
        *HEAD_NORMS,
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
        flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        layer_types=late_sliding_window,
    ),
)
