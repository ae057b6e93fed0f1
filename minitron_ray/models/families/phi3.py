"""Phi-3 and Phi-4: Llama whose queries, keys and values are one matrix, and gate and up another."""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tensor
from minitron_ray.models.standard import (
    ATTENTION,
    CARRIED,
    EMBEDDING,
    FINAL_NORM,
    GROUPS,
    INPUT_NORM,
    LM_HEAD,
    MLP,
    POST_ATTENTION_NORM,
    QUERIES,
    TAPS,
)

FAMILY = Family(
    model_type="phi3",
    causal_lm="Phi3ForCausalLM",
    tensors=(
        EMBEDDING,
        INPUT_NORM,
        Tensor(
            ATTENTION + "qkv_proj.weight", (f"{QUERIES} + {GROUPS} + {GROUPS}", "hidden"), makes_heads=True
        ),
        Tensor(ATTENTION + "o_proj.weight", ("hidden", QUERIES)),
        POST_ATTENTION_NORM,
        Tensor(MLP + "gate_up_proj.weight", ("mlp + mlp", "hidden")),
        Tensor(MLP + "down_proj.weight", ("hidden", "mlp")),
        FINAL_NORM,
        LM_HEAD,
    ),
    taps=TAPS,
    attributes=Attributes(
        carried=CARRIED
        | frozenset(
            {
                "hidden_act",
                "original_max_position_embeddings",
                "rms_norm_eps",
                "partial_rotary_factor",
                "resid_pdrop",
                "embd_pdrop",
                "sliding_window",
            }
        ),
        flags={"tied": "tie_word_embeddings"},
        required_values={
            "attention_bias": False,
            "mlp_bias": False,
            "lm_head_bias": False,
            # Of Phi-4-mini: every layer attends, and positions are as they are.
            "full_attn_mod": 1,
            "interpolate_factor": 1,
        },
        checks_rotary_factors=True,
    ),
)
