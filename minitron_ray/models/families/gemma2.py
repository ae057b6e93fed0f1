"""Gemma 2: norms before and after attention and MLP, soft caps on scores and logits, every other layer
with a sliding window, embeddings times sqrt(hidden).

Its norms store γ - 1 and are cut like any other, as Nemotron's are.
"""

from collections.abc import Mapping
from typing import Any

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tap, Tensor
from minitron_ray.models.scaling import embedding_at_teachers_scale, final_norm_at_teachers_scale
from minitron_ray.models.standard import (
    CARRIED,
    GATED_MLP,
    INPUT_NORM,
    LAYER,
    LM_HEAD,
    OPTIONAL_BIASES,
    POST_ATTENTION_NORM,
    PROJECTIONS,
    TAPS,
)


def alternating_window(config: Mapping[str, Any]) -> list[str]:
    """Sliding, full, sliding and so on."""
    return [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(config["num_hidden_layers"])
    ]


FAMILY = Family(
    model_type="gemma2",
    causal_lm="Gemma2ForCausalLM",
    tensors=(
        Tensor("model.embed_tokens.weight", ("vocab", "hidden"), rescaled=embedding_at_teachers_scale),
        INPUT_NORM,
        *PROJECTIONS,
        *OPTIONAL_BIASES,
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
                "hidden_act",  # of old configs; transformers reads hidden_activation
                "hidden_activation",
                "rms_norm_eps",
                "query_pre_attn_scalar",
                "sliding_window",
                "attn_logit_softcapping",
                "cache_implementation",
            }
        ),
        flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
        defaults={
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "final_logit_softcapping": 30.0,
        },
        required_values={"use_bidirectional_attention": False},
        layer_types=alternating_window,
    ),
    # Gemma2Config refuses other sizes even with head_dim given.
    multiples=(("hidden", "heads"),),
    softcap="final_logit_softcapping",
    attention="eager",  # the others leave out the soft cap on attention scores
)
