"""Counts of published models to the parameter, and configs as hubs have them."""

from __future__ import annotations

from typing import Any

import pytest

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.families import family_of, supported
from minitron_ray.models.kept import Kept

LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
NEMOTRON_15B: dict[str, Any] = {
    "architectures": ["NemotronForCausalLM"],
    "head_dim": 128,
    "hidden_act": "relu2",
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "max_position_embeddings": 4096,
    "model_type": "nemotron",
    "norm_eps": 1e-05,
    "num_attention_heads": 48,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
MINITRON_8B = {**NEMOTRON_15B, "hidden_size": 4096, "intermediate_size": 16384}
MINITRON_4B = {**NEMOTRON_15B, "hidden_size": 3072, "intermediate_size": 9216, "num_attention_heads": 24}
WIDTH_4B = {**LLAMA_31_8B, "hidden_size": 3072, "intermediate_size": 9216, "head_dim": 128}


@pytest.mark.parametrize(
    ("config", "total", "core"),
    [
        pytest.param(NEMOTRON_15B, 15_628_775_424, 12_483_047_424, id="Nemotron-4-15B"),
        pytest.param(MINITRON_8B, 8_271_699_968, 6_174_547_968, id="Minitron-8B"),
        pytest.param(MINITRON_4B, 4_190_509_056, 2_617_645_056, id="Minitron-4B"),
        pytest.param(LLAMA_31_8B, 8_030_261_248, 6_979_588_096, id="Llama-3.1-8B"),
        pytest.param(WIDTH_4B, 4_512_746_496, 3_724_741_632, id="Llama-3.1-Minitron-4B-Width"),
        pytest.param(SMOLLM2, 134_515_008, 134_515_008 - 49152 * 576, id="SmolLM2-135M"),
    ],
)
def test_published_counts(config: dict[str, Any], total: int, core: int) -> None:
    family = family_of(config)
    arch = family.read(config)
    assert family.parameters(arch) == total
    assert family.non_embedding_parameters(arch) == core
    sizes = [1] * len(family.shapes(arch))
    for index, shape in enumerate(family.shapes(arch).values()):
        for size in shape:
            sizes[index] *= size
    assert sum(sizes) == total


def test_sizes_are_read_and_written_out() -> None:
    arch = family_of(SMOLLM2).read(SMOLLM2)
    assert (arch.layers, arch.hidden, arch.heads, arch.kv_heads) == (30, 576, 9, 3)
    assert (arch.head_dim, arch.mlp, arch.vocab, arch.tied) == (64, 1536, 49152, True)
    assert arch.shape_text() == "30L 576H 9h/3 1536m"
    canonical = family_of(SMOLLM2).canonical(SMOLLM2)
    assert canonical["head_dim"] == 64 and canonical["rope_theta"] == 100000
    assert "head_dim" not in SMOLLM2


def test_old_names_are_understood_and_replaced() -> None:
    old = {k: v for k, v in MINITRON_8B.items() if k not in ("head_dim", "partial_rotary_factor")}
    old |= {"kv_channels": 128, "rope_percentage": 0.5}
    family = family_of(old)
    assert family.read(old) == family.read(MINITRON_8B)
    canonical = family.canonical(old)
    assert canonical["head_dim"] == 128 and canonical["partial_rotary_factor"] == 0.5
    assert not {"kv_channels", "rope_percentage"} & canonical.keys()


def test_student_config_slices_lists_and_carries_the_rest() -> None:
    config = {**SMOLLM2, "num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]}
    family = family_of(config)
    teacher = family.read(config)
    whole = Kept.whole(teacher)
    kept = Kept(layers=(0, 3), hidden=tuple(range(540)), heads=(tuple(range(9)),) * 2, mlp=((1, 2), (3, 4)))
    student = family.student_config(config, kept.architecture(teacher), kept)
    changed = {k: v for k, v in student.items() if config.get(k) != v}
    assert changed == {
        "num_hidden_layers": 2,
        "hidden_size": 540,
        "intermediate_size": 2,
        "head_dim": 64,
        "layer_types": ["a", "d"],
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert config["layer_types"] == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="do not give 2L 540H 9h/3 2m"):
        family.student_config(config, kept.architecture(teacher), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"use_qk_norm": True, "num_experts": 8},
            r"does not know: use_qk_norm = True, num_experts = 8;.*llama\.py",
        ),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"auto_map": {"AutoModel": "x.Y"}}, r"own code \(auto_map: x\.Y\), which is never run"),
        ({"auto_map": {"AutoModelForCausalLM": "o/r--x.MyLlama"}}, "auto_map: o/r--x.MyLlama"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Phi3ForCausalLM"}}, "if stock LlamaForCausalLM computes"),
        ({"auto_map": "x.LlamaForCausalLM"}, "auto_map: 'x.LlamaForCausalLM'"),
        (
            {"auto_map": {"AutoModelForCausalLM": "x.LlamaForCausalLM"}, "use_qk_norm": True},
            "does not know: use_qk_norm = True;",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": "576"}, "hidden_size is '576', must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"layer_types": ["full_attention"]}, "must be a list of 30"),
        ({"num_key_value_heads": 2}, "9 heads do not divide into 2 KV groups"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"hidden_size": 577, "head_dim": 64}, "multiple of heads, 577 is none of 9"),
    ],
)
def test_a_config_beyond_the_table_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    config = {**SMOLLM2, **change}
    with pytest.raises(ConfigError, match=message) as caught:
        family_of(config).read(config)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "harmless", [{"use_qk_norm": None}, {"pruned_heads": {}}, {"temperature": 0.7}, {"pad_token_id": 3}]
)
def test_attributes_without_effect_are_accepted(harmless: dict[str, Any]) -> None:
    assert family_of(SMOLLM2).read({**SMOLLM2, **harmless}) == family_of(SMOLLM2).read(SMOLLM2)


@pytest.mark.parametrize(
    "code",
    [
        {"AutoConfig": "configuration_llama.LlamaConfig", "AutoModelForCausalLM": "x.LlamaForCausalLM"},
        {"AutoModel": "x.LlamaModel", "AutoModelForCausalLM": "owner/repository--x.LlamaForCausalLM"},
        {"AutoTokenizer": ["x.LlamaTokenizer", None]},
        {},
    ],
)
def test_code_of_the_stock_network_is_not_needed_and_not_passed_on(code: dict[str, Any]) -> None:
    config, family = {**SMOLLM2, "auto_map": code}, family_of(SMOLLM2)
    assert family.read(config) == family.read(SMOLLM2)
    assert family.canonical(config) == family.canonical(SMOLLM2)
    arch = family.read(config)
    assert "auto_map" not in family.student_config(config, arch, Kept.whole(arch)) and "auto_map" in config


def test_nemotron_needs_its_kv_heads_written_out() -> None:
    config = {**NEMOTRON_15B, "num_key_value_heads": None}
    with pytest.raises(ConfigError, match=r"no num_key_value_heads, .* have 8"):
        family_of(config).read(config)


def test_names_that_disagree_are_refused() -> None:
    config = {**NEMOTRON_15B, "kv_channels": 64}
    with pytest.raises(ConfigError, match="kv_channels = 64 and head_dim = 128"):
        family_of(config).read(config)


@pytest.mark.parametrize("model_type", ["bloom", "../llama", "__init__"])
def test_unknown_family(model_type: str) -> None:
    with pytest.raises(ConfigError, match=r"is not supported; supported are .*llama, .*nemotron.*families/"):
        family_of({"model_type": model_type})


def test_config_without_a_family() -> None:
    with pytest.raises(ConfigError, match="names no model_type; supported are gemma2, "):
        family_of({"hidden_size": 8})
    assert {"llama", "nemotron"} < set(supported()) and list(supported()) == sorted(supported())
