"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from minitron_ray.models.configuration import Attributes, late_sliding_window
from minitron_ray.models.family import HIDDEN_TAPS, Family, Tap, Tensor

LAYER = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."
QUERIES, GROUPS = "heads*head_dim", "kv_heads*head_dim"

FAMILY = Family(
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    tensors=(
        Tensor("model.embed_tokens.weight", ("vocab", "hidden")),
        Tensor(LAYER + "input_layernorm.weight", ("hidden",)),
        Tensor(ATTENTION + "q_proj.weight", (QUERIES, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "k_proj.weight", (GROUPS, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "v_proj.weight", (GROUPS, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "o_proj.weight", ("hidden", QUERIES)),
        Tensor(ATTENTION + "q_proj.bias", (QUERIES,), makes_heads=True),
        Tensor(ATTENTION + "k_proj.bias", (GROUPS,), makes_heads=True),
        Tensor(ATTENTION + "v_proj.bias", (GROUPS,), makes_heads=True),
        Tensor(LAYER + "post_attention_layernorm.weight", ("hidden",)),
        Tensor(MLP + "gate_proj.weight", ("mlp", "hidden")),
        Tensor(MLP + "up_proj.weight", ("mlp", "hidden")),
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
                "rms_norm_eps",
                "rope_theta",
                "rope_scaling",
                "rope_parameters",
                "attention_dropout",
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
