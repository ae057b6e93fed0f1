"""Gemma 3, the language model alone: Gemma 2 with norms over each query and key head instead of soft
caps, five layers with a sliding window to one without, and other rotary positions for each of the two.

Embeddings are times sqrt(hidden). Norms store γ - 1 and are cut like any other.
"""

from collections.abc import Mapping
from typing import Any

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tap, Tensor
from minitron_ray.models.scaling import embedding_at_teachers_scale, final_norm_at_teachers_scale

LAYER = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."
QUERIES, GROUPS = "heads*head_dim", "kv_heads*head_dim"


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
        Tensor(LAYER + "input_layernorm.weight", ("hidden",)),
        Tensor(ATTENTION + "q_proj.weight", (QUERIES, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "k_proj.weight", (GROUPS, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "v_proj.weight", (GROUPS, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "o_proj.weight", ("hidden", QUERIES)),
        Tensor(ATTENTION + "q_proj.bias", (QUERIES,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "k_proj.bias", (GROUPS,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "v_proj.bias", (GROUPS,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "o_proj.bias", ("hidden",), needs="attention_bias"),
        Tensor(ATTENTION + "q_norm.weight", ("head_dim",)),
        Tensor(ATTENTION + "k_norm.weight", ("head_dim",)),
        Tensor(LAYER + "post_attention_layernorm.weight", ("hidden",)),
        Tensor(LAYER + "pre_feedforward_layernorm.weight", ("hidden",)),
        Tensor(MLP + "gate_proj.weight", ("mlp", "hidden")),
        Tensor(MLP + "up_proj.weight", ("mlp", "hidden")),
        Tensor(MLP + "down_proj.weight", ("hidden", "mlp")),
        Tensor(LAYER + "post_feedforward_layernorm.weight", ("hidden",)),
        Tensor("model.norm.weight", ("hidden",), rescaled=final_norm_at_teachers_scale),
        Tensor("lm_head.weight", ("vocab", "hidden"), unless="tied"),
    ),
    taps={
        "mlp": (Tap(MLP + "down_proj", "input"),),
        "heads": (Tap(ATTENTION + "o_proj", "input"),),
        "hidden": (
            Tap(LAYER + "input_layernorm", "output"),
            Tap(LAYER + "pre_feedforward_layernorm", "output"),
        ),
    },
    attributes=Attributes(
        carried=frozenset(
            {
                "hidden_activation",
                "max_position_embeddings",
                "rms_norm_eps",
                "rope_theta",
                "rope_local_base_freq",
                "rope_scaling",
                "rope_parameters",
                "attention_dropout",
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
