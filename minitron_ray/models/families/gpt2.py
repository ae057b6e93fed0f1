"""GPT-2: LayerNorm with bias, plain MLP, learned positions, matrices stored inputs first. head_dim is
always hidden / heads.

Published checkpoints leave out the prefix `transformer.` and hold masks.
"""

from minitron_ray.models.configuration import Attributes
from minitron_ray.models.family import Family, Tap, Tensor
from minitron_ray.models.standard import LM_HEAD

LAYER = "transformer.h.{layer}."
ATTENTION, MLP = LAYER + "attn.", LAYER + "mlp."
HEADS, MADE = "heads*head_dim", "3*heads*head_dim"

FAMILY = Family(
    model_type="gpt2",
    causal_lm="GPT2LMHeadModel",
    tensors=(
        Tensor("transformer.wte.weight", ("vocab", "hidden")),
        Tensor("transformer.wpe.weight", ("positions", "hidden")),
        Tensor(LAYER + "ln_1.weight", ("hidden",)),
        Tensor(LAYER + "ln_1.bias", ("hidden",)),
        Tensor(ATTENTION + "c_attn.weight", ("hidden", MADE), makes_heads=True),
        Tensor(ATTENTION + "c_attn.bias", (MADE,), makes_heads=True),
        Tensor(ATTENTION + "c_proj.weight", (HEADS, "hidden")),
        Tensor(ATTENTION + "c_proj.bias", ("hidden",)),
        Tensor(LAYER + "ln_2.weight", ("hidden",)),
        Tensor(LAYER + "ln_2.bias", ("hidden",)),
        Tensor(MLP + "c_fc.weight", ("hidden", "mlp")),
        Tensor(MLP + "c_fc.bias", ("mlp",)),
        Tensor(MLP + "c_proj.weight", ("mlp", "hidden")),
        Tensor(MLP + "c_proj.bias", ("hidden",)),
        Tensor("transformer.ln_f.weight", ("hidden",)),
        Tensor("transformer.ln_f.bias", ("hidden",)),
        LM_HEAD,
    ),
    taps={
        "mlp": (Tap(MLP + "c_proj", "input"),),
        "heads": (Tap(ATTENTION + "c_proj", "input"),),
        "hidden": (Tap(LAYER + "ln_1", "output"), Tap(LAYER + "ln_2", "output")),
    },
    attributes=Attributes(
        carried=frozenset(
            {
                "activation_function",
                "layer_norm_epsilon",
                "scale_attn_weights",
                "reorder_and_upcast_attn",
                "resid_pdrop",
                "embd_pdrop",
                "attn_pdrop",
                # Without effect on the language model.
                *("n_ctx", "n_special", "predict_special_tokens", "summary_type", "summary_use_proj"),
                *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
            }
        ),
        sizes={
            "layers": "n_layer",
            "hidden": "n_embd",
            "heads": "n_head",
            "mlp": "n_inner",
            "vocab": "vocab_size",
            "positions": "n_positions",
        },
        flags={"tied": "tie_word_embeddings"},
        defaults={"tie_word_embeddings": True, "n_positions": 1024},
        # Scales by the layer's number, which a cut in depth would change.
        required_values={"scale_attn_by_inverse_layer_idx": False},
        aliases={
            "num_hidden_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        derives_heads=True,
        mlp_of_hidden=4,
    ),
    square_heads=True,
    backbone="transformer",
    decoder_layers="transformer.h",
    final_norm="transformer.ln_f",
    embedding="transformer.wte",
    ignored_tensors=(".attn.bias", ".attn.masked_bias"),
)
