"""Phi-3 and Phi-4: Llama whose queries, keys and values are one matrix, and gate and up another."""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import HIDDEN_TAPS, Family, Tap, Tensor

LAYER = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."
QUERIES, GROUPS = "heads*head_dim", "kv_heads*head_dim"

FAMILY = Family(
    model_type="phi3",
    causal_lm="Phi3ForCausalLM",
    tensors=(
        Tensor("model.embed_tokens.weight", ("vocab", "hidden")),
        Tensor(LAYER + "input_layernorm.weight", ("hidden",)),
        Tensor(
            ATTENTION + "qkv_proj.weight", (f"{QUERIES} + {GROUPS} + {GROUPS}", "hidden"), makes_heads=True
        ),
        Tensor(ATTENTION + "o_proj.weight", ("hidden", QUERIES)),
        Tensor(LAYER + "post_attention_layernorm.weight", ("hidden",)),
        Tensor(MLP + "gate_up_proj.weight", ("mlp + mlp", "hidden")),
        Tensor(MLP + "down_proj.weight", ("hidden", "mlp")),
        Tensor("model.norm.weight", ("hidden",)),
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
                "original_max_position_embeddings",
                "rms_norm_eps",
                "rope_theta",
                "rope_scaling",
                "rope_parameters",
                "partial_rotary_factor",
                "attention_dropout",
                "resid_pdrop",
                "embd_pdrop",
                "sliding_window",
            }
        ),
        flags={"tied": "tie_word_embeddings"},
        required_values={"attention_bias": False, "mlp_bias": False, "lm_head_bias": False},
        checks_rotary_factors=True,
    ),
)
