"""GPT-NeoX and Pythia: LayerNorm with bias, plain MLP, partly rotary positions, one matrix for queries,
keys and values interleaved head by head. head_dim is always hidden / heads.

Published checkpoints call the LM head `embed_out` and hold masks and frequencies.
"""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tap, Tensor
from minitron_ray.models.standard import LM_HEAD

LAYER = "gpt_neox.layers.{layer}."
ATTENTION, MLP = LAYER + "attention.", LAYER + "mlp."
HEADS, MADE = "heads*head_dim", "heads*3*head_dim"

FAMILY = Family(
    model_type="gpt_neox",
    causal_lm="GPTNeoXForCausalLM",
    tensors=(
        Tensor("gpt_neox.embed_in.weight", ("vocab", "hidden")),
        Tensor(LAYER + "input_layernorm.weight", ("hidden",)),
        Tensor(LAYER + "input_layernorm.bias", ("hidden",)),
        Tensor(LAYER + "post_attention_layernorm.weight", ("hidden",)),
        Tensor(LAYER + "post_attention_layernorm.bias", ("hidden",)),
        Tensor(ATTENTION + "query_key_value.weight", (MADE, "hidden"), makes_heads=True),
        Tensor(ATTENTION + "query_key_value.bias", (MADE,), needs="attention_bias", makes_heads=True),
        Tensor(ATTENTION + "dense.weight", ("hidden", HEADS)),
        Tensor(ATTENTION + "dense.bias", ("hidden",), needs="attention_bias"),
        Tensor(MLP + "dense_h_to_4h.weight", ("mlp", "hidden")),
        Tensor(MLP + "dense_h_to_4h.bias", ("mlp",)),
        Tensor(MLP + "dense_4h_to_h.weight", ("hidden", "mlp")),
        Tensor(MLP + "dense_4h_to_h.bias", ("hidden",)),
        Tensor("gpt_neox.final_layer_norm.weight", ("hidden",)),
        Tensor("gpt_neox.final_layer_norm.bias", ("hidden",)),
        LM_HEAD,
    ),
    taps={
        "mlp": (Tap(MLP + "dense_4h_to_h", "input"),),
        "heads": (Tap(ATTENTION + "dense", "input"),),
        "hidden": (
            Tap(LAYER + "input_layernorm", "output"),
            Tap(LAYER + "post_attention_layernorm", "output"),
        ),
    },
    attributes=Attributes(
        carried=frozenset(
            {
                "hidden_act",
                "max_position_embeddings",
                "layer_norm_eps",
                "use_parallel_residual",
                "rotary_pct",
                "rotary_emb_base",
                "rope_theta",
                "partial_rotary_factor",
                "rope_scaling",
                "rope_parameters",
                "attention_dropout",
                "hidden_dropout",
                "classifier_dropout",
            }
        ),
        flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
        defaults={"attention_bias": True},
        derives_heads=True,
    ),
    square_heads=True,
    backbone="gpt_neox",
    decoder_layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    embedding="gpt_neox.embed_in",
    ignored_tensors=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    old_names={"embed_out.weight": "lm_head.weight"},
)
