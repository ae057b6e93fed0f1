"""Gemma 3, the language model alone: Gemma 2 with norms over each query and key head instead of soft
caps, five layers with a sliding window to one without, and other rotary positions for each of the two.

Embeddings are times sqrt(hidden). Norms store γ - 1 and are cut like any other.
"""

from collections.abc import Mapping
from typing import Any

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tap, Tensor
from minitron_ray.models.scaling import embedding_at_teachers_scale, final_norm_at_teachers_scale
from minitron_ray.models.standard import (
    CARRIED,
    GATED_MLP,
    HEAD_NORMS,
    INPUT_NORM,
    LAYER,
    LM_HEAD,
    OPTIONAL_BIASES,
    POST_ATTENTION_NORM,
    PROJECTIONS,
    TAPS,
)


def mostly_window(config: Mapping[str, Any]) -> list[str]:
    """Every `sliding_window_pattern`-th layer full, the others sliding."""
    period = config.get("sliding_window_pattern", 6)
    return [
        "sliding_attention" if (layer + 1) % period else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]


FAMILY = Family(
    model_type="gemma3_text",
    causal_lm="Gemma3ForCausalLM",
    tensors=(
        Tensor("model.embed_tokens.weight", ("vocab", "hidden"), rescaled=embedding_at_teachers_scale),
        INPUT_NORM,
        *PROJECTIONS,
        *OPTIONAL_BIASES,
        *HEAD_NORMS,
        POST_ATTENTION_NORM,
        Tensor(LAYER + "pre_feedforward_layernorm.weight", ("hidden",)),
        *GATED_MLP,
        Tensor(LAYER + "post_feedforward_layernorm.weight", ("hidden",)),
        Tensor("model.norm.weight", ("hidden",), rescaled=final_norm_at_teachers_scale),
        LM_HEAD,
    ),
    taps={
        **TAPS,
        "hidden": (
            Tap(LAYER + "input_layernorm", "output"),
            Tap(LAYER + "pre_feedforward_layernorm", "output"),
        ),
    },
    attributes=Attributes(
        carried=CARRIED
        | frozenset(
            {
                "hidden_activation",
                "rms_norm_eps",
                "rope_local_base_freq",
                "query_pre_attn_scalar",
                "sliding_window",
                "sliding_window_pattern",
                "_sliding_window_pattern",
                "attn_logit_softcapping",  # read by no attention of the stock model
                "final_logit_softcapping",
                "cache_implementation",
            }
        ),
        flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
        defaults={"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 256},
        required_values={"use_bidirectional_attention": False},
        layer_types=mostly_window,
    ),
    # Gemma3TextConfig refuses other sizes even with head_dim given.
    multiples=(("hidden", "heads"),),
    softcap="final_logit_softcapping",
)
