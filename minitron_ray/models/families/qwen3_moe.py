"""Qwen3-MoE: Qwen3 whose MLP is a router over experts. Only networks with experts in every layer.

Published checkpoints hold each expert's three matrices; the stock model stacks them.
"""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import HIDDEN_TAPS, Family, Tap, Tensor

LAYER = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."
EXPERT = MLP + "experts.{expert}."
QUERIES, GROUPS = "heads*head_dim", "kv_heads*head_dim"

FAMILY = Family(
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
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
        Tensor(ATTENTION + "q_norm.weight", ("head_dim",)),
        Tensor(ATTENTION + "k_norm.weight", ("head_dim",)),
        Tensor(LAYER + "post_attention_layernorm.weight", ("hidden",)),
        Tensor(MLP + "gate.weight", ("experts", "hidden")),
        Tensor(EXPERT + "gate_proj.weight", ("expert_mlp", "hidden")),
        Tensor(EXPERT + "up_proj.weight", ("expert_mlp", "hidden")),
        Tensor(EXPERT + "down_proj.weight", ("hidden", "expert_mlp")),
        Tensor("model.norm.weight", ("hidden",)),
        Tensor("lm_head.weight", ("vocab", "hidden"), unless="tied"),
    ),
    stacks={
        MLP + "experts.gate_up_proj": (EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight"),
        MLP + "experts.down_proj": (EXPERT + "down_proj.weight",),
    },
    taps={
        "heads": (Tap(ATTENTION + "o_proj", "input"),),
        "hidden": HIDDEN_TAPS,
        "experts": (Tap(MLP + "experts", "input"),),
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
                "max_window_layers",  # without effect: the window is on every layer or on none
                "norm_topk_prob",
                "router_aux_loss_coef",
                "output_router_logits",
                "intermediate_size",  # of dense layers, of which there are none
            }
        ),
        sizes={
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "heads": "num_attention_heads",
            "experts": "num_experts",
            "expert_mlp": "moe_intermediate_size",
            "active_experts": "num_experts_per_tok",
            "vocab": "vocab_size",
        },
        flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
        defaults={"num_key_value_heads": 4},
        required_values={"decoder_sparse_step": 1, "mlp_only_layers": []},
        aliases={"num_local_experts": "num_experts"},
    ),
    # The stock model's grouped products want rows of whole 16 bytes; weights have two or four a value.
    multiples=(("hidden", 8), ("expert_mlp", 8)),
)
