"""Qwen3-MoE: Qwen3 whose MLP is a router over experts. Only networks with experts in every layer.

Published checkpoints hold each expert's three matrices; the stock model stacks them.
"""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tap, Tensor
from minitron_ray.models.standard import (
    CARRIED,
    EMBEDDING,
    FINAL_NORM,
    HEAD_NORMS,
    HEAD_TAPS,
    HIDDEN_TAPS,
    INPUT_NORM,
    LM_HEAD,
    MLP,
    OPTIONAL_BIASES,
    POST_ATTENTION_NORM,
    PROJECTIONS,
)

EXPERT = MLP + "experts.{expert}."

FAMILY = Family(
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    tensors=(
        EMBEDDING,
        INPUT_NORM,
        *PROJECTIONS,
        *OPTIONAL_BIASES,
        *HEAD_NORMS,
        POST_ATTENTION_NORM,
        Tensor(MLP + "gate.weight", ("experts", "hidden")),
        Tensor(EXPERT + "gate_proj.weight", ("expert_mlp", "hidden")),
        Tensor(EXPERT + "up_proj.weight", ("expert_mlp", "hidden")),
        Tensor(EXPERT + "down_proj.weight", ("hidden", "expert_mlp")),
        FINAL_NORM,
        LM_HEAD,
    ),
    stacks={
        MLP + "experts.gate_up_proj": (EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight"),
        MLP + "experts.down_proj": (EXPERT + "down_proj.weight",),
    },
    taps={
        "heads": HEAD_TAPS,
        "hidden": HIDDEN_TAPS,
        "experts": (Tap(MLP + "experts", "input"),),
    },
    attributes=Attributes(
        carried=CARRIED
        | frozenset(
            {
                "hidden_act",
                "rms_norm_eps",
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
