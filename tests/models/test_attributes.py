"""Configs of every family are read as stock transformers reads them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.families import family_of, rewritten
from minitron_ray.models.kept import Kept

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
    "vocab_size": 60000,
}
ABSENT: dict[str, dict[str, Any]] = {
    **{
        name: {**SIZES, "model_type": name}
        for name in ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")
    },
    **{name: {**SIZES, "model_type": name} for name in ("gemma2", "gemma3_text", "gpt_neox")},
    "nemotron": {**SIZES, "model_type": "nemotron", "num_key_value_heads": 8},
    "gpt2": {"model_type": "gpt2", "n_embd": 96, "n_head": 4, "n_layer": 3, "vocab_size": 60000},
    "qwen3_moe": {**SIZES, "model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 64},
}


def stock(config: dict[str, Any]) -> Any:
    attributes = {name: value for name, value in config.items() if name != "model_type"}
    return AutoConfig.for_model(config["model_type"], **attributes)


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_absent_is_what_stock_transformers_takes(name: str) -> None:
    config = ABSENT[name]
    arch, theirs = family_of(config).read(config), stock(config)
    heads = theirs.num_attention_heads
    assert arch.kv_heads == getattr(theirs, "num_key_value_heads", heads)
    assert arch.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert arch.tied == theirs.tie_word_embeddings
    assert arch.attention_bias == getattr(theirs, "attention_bias", False)
    assert arch.positions == getattr(theirs, "n_positions", 0)
    if name == "gpt2":
        assert arch.mlp == 4 * 96 and theirs.n_inner is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": None}),
        ("qwen3", {"use_sliding_window": True}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gemma3_text", {"sliding_window_pattern": 3}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 6 + ["sliding_attention"]}),
    ],
)
def test_types_of_layers_are_written_out_as_stock_transformers_makes_them_up(
    name: str, change: dict[str, Any]
) -> None:
    config = {**ABSENT[name], **change}
    family = family_of(config)
    theirs = stock(config).layer_types
    assert family.canonical(config)["layer_types"] == theirs
    teacher = family.read(config)
    whole = Kept.whole(teacher)
    kept = Kept(layers=(1, 5, 6), hidden=whole.hidden, heads=whole.heads[:3], mlp=whole.mlp[:3])
    student = family.student_config(config, kept.architecture(teacher), kept)
    assert stock(student).layer_types == [theirs[1], theirs[5], theirs[6]]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gpt2", {"n_head": 5}, "n_embd 96 is no multiple of n_head 5"),
        ("gpt2", {"hidden_size": 128}, "hidden_size = 128 and n_embd = 96; remove one"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("qwen3_moe", {"num_experts": 4}, "4 experts are fewer than the 8 a token goes to"),
        ("qwen3_moe", {"hidden_size": 4100}, "hidden to be a multiple of 8, 4100 is none"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "must be a list of 7"),
        (
            "phi3",
            {"head_dim": 64, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32}},
            "LongRoPE needs hidden / heads to be 64, 4096 / 32 is not",
        ),
    ],
)
def test_what_a_table_does_not_compute_is_refused_by_name(
    name: str, change: dict[str, Any], message: str
) -> None:
    config = {**ABSENT[name], **change}
    with pytest.raises(ConfigError, match=message) as caught:
        family_of(config).read(config)
    assert "\n" not in caught.value.message


def test_harmless_values_of_refused_attributes_are_accepted() -> None:
    config = {**ABSENT["qwen3_moe"], "decoder_sparse_step": 1, "mlp_only_layers": []}
    assert family_of(config).read(config).experts == 16
    # The name that stock transformers writes.
    config = {"num_local_experts" if n == "num_experts" else n: v for n, v in config.items()}
    assert family_of(config).read(config).experts == 16


def test_only_what_computes_the_same_is_rewritten() -> None:
    llama = ABSENT["llama"]
    written = rewritten(llama, "mistral")
    assert written["max_position_embeddings"] == stock(llama).max_position_embeddings
    assert written["sliding_window"] is None and written["architectures"] == ["MistralForCausalLM"]
    with pytest.raises(ConfigError, match="can't be written as 'gpt2'; it can be as mistral"):
        rewritten(llama, "gpt2")
    with pytest.raises(ConfigError, match="attention_bias = true, which mistral does not have"):
        rewritten({**llama, "attention_bias": True}, "mistral")
