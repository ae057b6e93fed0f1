"""OLMo 2: norms after attention and MLP instead of before, and one norm over all queries, one over all keys.

Those two norms see every head: where heads are cut their statistics change, as those of the other
norms do with hidden channels.
"""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tap, Tensor

LAYER = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."
QUERIES, GROUPS = "heads*head_dim", "kv_heads*head_dim"

FAMILY = Family(
    model_type="olmo2",
    causal_lm="Olmo2ForCausalLM",
    tensors=(
        Tensor("model.embed_tokens.weight", ("vocab", "hidden")),
        Tensor(ATTENTION + "q_proj.weight", (QUERIES, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "k_proj.weight", (GROUPS, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "v_proj.weight", (GROUPS, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "o_proj.weight", ("hidden", QUERIES)),
        Tensor(ATTENTION + "q_proj.bias", (QUERIES,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "k_proj.bias", (GROUPS,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "v_proj.bias", (GROUPS,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "o_proj.bias", ("hidden",), needs="attention_bias"),
        Tensor(ATTENTION + "q_norm.weight", (QUERIES,), makes_heads=True),
        Tensor(ATTENTION + "k_norm.weight", (GROUPS,), makes_heads=True),
        Tensor(LAYER + "post_attention_layernorm.weight", ("hidden",)),
        Tensor(MLP + "gate_proj.weight", ("mlp", "hidden")),
        Tensor(MLP + "up_proj.weight", ("mlp", "hidden")),
        Tensor(MLP + "down_proj.weight", ("hidden", "mlp")),
        Tensor(LAYER + "post_feedforward_layernorm.weight", ("hidden",)),
        Tensor("model.norm.weight", ("hidden",)),
        Tensor("lm_head.weight", ("vocab", "hidden"), unless="tied"),
    ),
    taps={
        "mlp": (Tap(MLP + "down_proj", "input"),),
        "heads": (Tap(ATTENTION + "o_proj", "input"),),
        "hidden": (
            Tap(LAYER + "post_attention_layernorm", "output"),
            Tap(LAYER + "post_feedforward_layernorm", "output"),
        ),
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
        flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    ),
    norm_over_heads=True,
)
