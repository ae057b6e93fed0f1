"""OLMo 2: norms after attention and MLP instead of before, and one norm over all queries, one over all keys.

Those two norms see every head: where heads are cut their statistics change, as those of the other
norms do with hidden channels.
"""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tap, Tensor
from minitron_ray.models.standard import (
    ATTENTION,
    CARRIED,
    EMBEDDING,
    FINAL_NORM,
    GATED_MLP,
    GROUPS,
    LAYER,
    LM_HEAD,
    OPTIONAL_BIASES,
    POST_ATTENTION_NORM,
    PROJECTIONS,
    QUERIES,
    TAPS,
)

FAMILY = Family(
    model_type="olmo2",
    causal_lm="Olmo2ForCausalLM",
    tensors=(
        EMBEDDING,
        *PROJECTIONS,
        *OPTIONAL_BIASES,
        Tensor(ATTENTION + "q_norm.weight", (QUERIES,), makes_heads=True),
        Tensor(ATTENTION + "k_norm.weight", (GROUPS,), makes_heads=True),
        POST_ATTENTION_NORM,
        *GATED_MLP,
        Tensor(LAYER + "post_feedforward_layernorm.weight", ("hidden",)),
        FINAL_NORM,
        LM_HEAD,
    ),
    taps={
        **TAPS,
        "hidden": (
            Tap(LAYER + "post_attention_layernorm", "output"),
            Tap(LAYER + "post_feedforward_layernorm", "output"),
        ),
    },
    attributes=Attributes(
        carried=CARRIED
        | frozenset(
            {
                "hidden_act",
                "rms_norm_eps",
            }
        ),
        flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    ),
    norms_inputs=False,
    norm_over_heads=True,
)
