"""Counts of published models to the parameter, from the values in their published configs.

The figures are the known ones, written down beforehand, and not read off our table; a second oracle is
counted here: stock transformers, built from the same values on the meta device, has as many
parameters. A tied LM head counts once; masks that some files hold as buffers do not count.
"""

from __future__ import annotations

from typing import Any

import pytest

from minitron_ray.models.families import family_of
from minitron_ray.weights.model import skeleton


def sizes(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
NEMOTRON: dict[str, Any] = {
    "architectures": ["NemotronForCausalLM"],
    "model_type": "nemotron",
    "head_dim": 128,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "norm_eps": 1e-05,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
}
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
QWEN3: dict[str, Any] = {
    **QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
    "sliding_window": None,
}
GEMMA: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
GEMMA2 = {**GEMMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
GEMMA2 |= {"hidden_act": "gelu_pytorch_tanh"}
PHI3: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
}
PYTHIA: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}

PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {**LLAMA, **sizes(4096, 14336, 32, 32, 8, 128256), "rope_theta": 500000.0, "mlp_bias": False},
    ),
    "TinyLlama-1.1B": (1_100_048_384, {**LLAMA, **sizes(2048, 5632, 22, 32, 4, 32000), "rope_scaling": None}),
    "SmolLM2-135M": (
        134_515_008,
        {**LLAMA, **sizes(576, 1536, 30, 9, 3, 49152), "tie_word_embeddings": True, "is_llama_config": True}
        | {"rope_interleaved": False, "rope_theta": 100000},
    ),
    "Nemotron-4-15B": (15_628_775_424, {**NEMOTRON, **sizes(6144, 24576, 32, 48, 8, 256000)}),
    "Minitron-8B": (8_271_699_968, {**NEMOTRON, **sizes(4096, 16384, 32, 48, 8, 256000)}),
    "Minitron-4B": (4_190_509_056, {**NEMOTRON, **sizes(3072, 9216, 32, 24, 8, 256000)}),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            **sizes(4096, 14336, 32, 32, 8, 32000),
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen2-0.5B": (
        494_032_768,
        {
            **QWEN2,
            **sizes(896, 4864, 24, 14, 2, 151936),
            "max_window_layers": 24,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen2-7B": (
        7_615_616_512,
        {**QWEN2, **sizes(3584, 18944, 28, 28, 4, 152064), "max_window_layers": 28}
        | {"tie_word_embeddings": False},
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            **QWEN3,
            **sizes(1024, 3072, 28, 16, 8, 151936),
            "max_window_layers": 28,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-8B": (
        8_190_735_360,
        {**QWEN3, **sizes(4096, 12288, 36, 32, 8, 151936), "max_window_layers": 36}
        | {"tie_word_embeddings": False},
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        {**QWEN3, **sizes(2048, 6144, 48, 32, 4, 151936), "architectures": ["Qwen3MoeForCausalLM"]}
        | {"model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": []}
        | {"max_window_layers": 48, "moe_intermediate_size": 768, "norm_topk_prob": True}
        | {"num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False}
        | {"router_aux_loss_coef": 0.001, "tie_word_embeddings": False},
    ),
    "gemma-2-2b": (2_614_341_888, {**GEMMA2, **sizes(2304, 9216, 26, 8, 4, 256000)}),
    "gemma-2-9b": (9_241_705_984, {**GEMMA2, **sizes(3584, 14336, 42, 16, 8, 256000)}),
    "gemma-3-1b": (
        999_885_952,
        {**GEMMA, **sizes(1152, 6912, 26, 4, 1, 262144), "architectures": ["Gemma3ForCausalLM"]}
        | {"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"max_position_embeddings": 32768, "rope_local_base_freq": 10000, "rope_scaling": None}
        | {"rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6},
    ),
    "Phi-3-mini-4k": (3_821_079_552, {**PHI3, **sizes(3072, 8192, 32, 32, 32, 32064)}),
    "Phi-3-mini-128k": (
        3_821_079_552,
        {**PHI3, **sizes(3072, 8192, 32, 32, 32, 32064), "max_position_embeddings": 131072}
        | {"rope_scaling": {"long_factor": [1.1] * 48, "short_factor": [1.05] * 48, "type": "longrope"}}
        | {"sliding_window": 262144},
    ),
    "Phi-4-mini": (
        3_836_021_760,
        {**PHI3, **sizes(3072, 8192, 32, 24, 8, 200064), "max_position_embeddings": 131072}
        | {"auto_map": {**PHI3["auto_map"], "AutoTokenizer": "Xenova/gpt-4o"}}
        | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
        | {"rope_scaling": {"long_factor": [1.1] * 48, "short_factor": [1.0] * 48, "type": "longrope"}}
        | {"partial_rotary_factor": 0.75, "sliding_window": 262144, "tie_word_embeddings": True},
    ),
    "OLMo-2-1124-7B": (
        7_298_617_344,
        {
            "architectures": ["Olmo2ForCausalLM"],
            "model_type": "olmo2",
            **sizes(4096, 11008, 32, 32, 32, 100352),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
        },
    ),
    "pythia-160m": (
        162_322_944,
        {**PYTHIA, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        | {"num_hidden_layers": 12},
    ),
    "pythia-1.4b": (
        1_414_647_808,
        {**PYTHIA, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}
        | {"num_hidden_layers": 24},
    ),
    "gpt2": (124_439_808, {**GPT2, "n_embd": 768, "n_head": 12, "n_layer": 12}),
    "gpt2-xl": (1_557_611_200, {**GPT2, "n_embd": 1600, "n_head": 25, "n_layer": 48}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_count_is_the_published_one(name: str) -> None:
    total, config = PUBLISHED[name]
    family = family_of(config)
    assert family.parameters(family.read(config)) == total
    assert sum(parameter.numel() for parameter in skeleton(config).parameters()) == total
