"""Llama: gated MLP, RMSNorm, rotary positions, grouped queries. Also SmolLM2 and Llama-3.1-Minitron."""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import HIDDEN_TAPS, Family, Tap, Tensor

LAYER = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."
QUERIES, GROUPS = "heads*head_dim", "kv_heads*head_dim"

FAMILY = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    tensors=(
        Tensor("model.embed_tokens.weight", ("vocab", "hidden")),
        Tensor(LAYER + "input_layernorm.weight", ("hidden",)),
        Tensor(ATTENTION + "q_proj.weight", (QUERIES, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "k_proj.weight", (GROUPS, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "v_proj.weight", (GROUPS, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "o_proj.weight", ("hidden", QUERIES)),
        Tensor(ATTENTION + "q_proj.bias", (QUERIES,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "k_proj.bias", (GROUPS,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "v_proj.bias", (GROUPS,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "o_proj.bias", ("hidden",), needs="attention_bias"),
        Tensor(LAYER + "post_attention_layernorm.weight", ("hidden",)),
        Tensor(MLP + "gate_proj.weight", ("mlp", "hidden")),
        Tensor(MLP + "up_proj.weight", ("mlp", "hidden")),
        Tensor(MLP + "down_proj.weight", ("hidden", "mlp")),
        Tensor(MLP + "gate_proj.bias", ("mlp",), needs="mlp_bias"),
        Tensor(MLP + "up_proj.bias", ("mlp",), needs="mlp_bias"),
        Tensor(MLP + "down_proj.bias", ("hidden",), needs="mlp_bias"),
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
            }
        ),
    ),
    # LlamaConfig refuses other sizes even with head_dim given.
    multiples=(("hidden", "heads"),),
    as_types={"mistral": {"sliding_window": None, "max_position_embeddings": 2048}},
)
