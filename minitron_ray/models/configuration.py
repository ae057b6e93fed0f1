"""What the attributes of a Hugging Face `config.json` mean to a family, and how a student's is written.

Every attribute is one of four things: a size or flag that the table reads; one that changes the
function but no shape, carried over as it is; one that says nothing about the network; or unknown.
An unknown attribute may mean tensors or arithmetic that the table does not have, so it is refused by
name unless it is null or has the value that switches it off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.architecture import Architecture

SIZES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "mlp": "intermediate_size",
        "vocab": "vocab_size",
    }
)
"""Axis to attribute, for the sizes that every config must state."""

FLAGS: Final[Mapping[str, str]] = MappingProxyType(
    {"tied": "tie_word_embeddings", "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
)

SILENT: Final = frozenset(
    {
        *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "auto_map"),
        *("name_or_path", "_name_or_path", "is_llama_config", "transformers.js_config"),
        *("unsloth_fixed", "unsloth_version", "tokenizer_class", "prefix"),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
        *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("use_cache", "initializer_range", "pretraining_tp"),
        *("return_dict", "output_attentions", "output_hidden_states", "output_scores"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        # Of generation, in configs written before generation_config.json.
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"),
        *("num_beam_groups", "num_return_sequences", "return_dict_in_generate", "remove_invalid_values"),
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
        *("suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty"),
    }
)
"""Attributes that say nothing about the network's tensors or arithmetic."""

SWITCHED_OFF: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "rope_interleaved": False,
        "use_sliding_window": False,
        "is_decoder": False,
        "is_encoder_decoder": False,
        "add_cross_attention": False,
        "tie_encoder_decoder": False,
        "chunk_size_feed_forward": 0,
        "pruned_heads": {},
        "torchscript": False,
        "use_bfloat16": False,
        "tf_legacy_loss": False,
    }
)
"""Attributes of other networks, with the value that means their absence."""

PER_LAYER: Final = frozenset({"layer_types"})
"""Lists with one entry a layer: a student keeps the entries of its layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """What differs between families in reading a config."""

    carried: frozenset[str]
    """Attributes that change the function but no shape."""
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)
    """Axis to attribute, for the sizes that a config states."""
    flags: Mapping[str, str] = field(default_factory=lambda: FLAGS)
    """Flag to attribute, for the flags that this family has."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What stock transformers takes for an attribute that is absent; null is null."""
    required_values: Mapping[str, Any] = field(default_factory=dict)
    """Attributes that the table supports with this one value only; absent is this value too."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names in old configs, which stock transformers no longer reads, to the names it does."""
    kv_heads_written: bool = False
    """Whether `num_key_value_heads` must be there: without it stock transformers cannot build the model."""
    derives_heads: bool = False
    """Neither `head_dim` nor `num_key_value_heads` is an attribute: head_dim is hidden / heads, and every
    head has keys and values of its own."""
    mlp_of_hidden: int | None = None
    """Where the MLP's size may be absent: so many times the hidden size."""
    layer_types: Callable[[Mapping[str, Any]], list[str]] | None = None
    """The list that stock transformers makes up where `layer_types` is absent, out of layers' numbers: it
    is written out, so that a student's layers keep the types they were trained with."""

    checks_rotary_factors: bool = False
    """Whether stock transformers counts LongRoPE's factors against hidden / heads, whatever head_dim is."""

    def read(self, config: Mapping[str, Any], model_type: str, causal_lm: str) -> Architecture:
        """The architecture that `config` states. Raises ConfigError, see `Family.read`."""
        config = self._renamed(config)
        _refuse_foreign(config, causal_lm)
        self._refuse_unknown(config, model_type)
        config = {n: value for n, value in {**self.defaults, **config}.items() if value is not None}
        if config.get("num_key_value_heads") is None and self.kv_heads_written:
            raise ConfigError(
                f"the model's config has no num_key_value_heads, which {model_type} needs written out "
                f"(Nemotron-4 15B and the Minitron models have 8)"
            )
        fields: dict[str, Any] = self._sizes(config)
        fields |= {flag: _flag(config, name) for flag, name in self.flags.items()}
        if self.checks_rotary_factors:
            ropes = (config.get("rope_scaling"), config.get("rope_parameters"))
            fields["long_rope"] = any("short_factor" in rope for rope in ropes if rope)
        arch = Architecture(family=model_type, **fields)
        for name in PER_LAYER & config.keys():
            entries = config[name]
            if not isinstance(entries, list) or len(entries) != arch.layers:
                raise ConfigError(
                    f"the model's config: {name} is {entries!r}, must be a list of {arch.layers}"
                )
        return arch

    def _sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        stated = dict(self.sizes)
        mlp = stated.pop("mlp", None)
        sizes = {axis: _size(config, name) for axis, name in stated.items()}
        hidden, heads = sizes["hidden"], sizes["heads"]
        if self.derives_heads:
            if hidden % heads:
                raise ConfigError(
                    f"the model's config: {stated['hidden']} {hidden} is no multiple of "
                    f"{stated['heads']} {heads}"
                )
            sizes |= {"kv_heads": heads, "head_dim": hidden // heads}
        else:
            sizes["kv_heads"] = _size(config, "num_key_value_heads", heads)
            sizes["head_dim"] = _size(config, "head_dim", hidden // heads)
        default = self.mlp_of_hidden and self.mlp_of_hidden * hidden
        sizes["mlp"] = 0 if mlp is None else _size(config, mlp, default)
        return sizes

    def write(
        self,
        config: Mapping[str, Any],
        arch: Architecture,
        causal_lm: str,
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """`config` with the sizes of `arch` written out; lists with an entry a layer are sliced."""
        written = self._renamed(config)
        for name, value in self.defaults.items():
            written.setdefault(name, value)  # null is not absent: it may switch a default off
        if self.layer_types is not None and written.get("layer_types") is None:
            written["layer_types"] = self.layer_types(written)
        written.update({name: getattr(arch, axis) for axis, name in self.sizes.items()})
        written.update({name: getattr(arch, flag) for flag, name in self.flags.items()})
        if not self.derives_heads:
            written.update(num_key_value_heads=arch.kv_heads, head_dim=arch.head_dim)
        written["architectures"] = [causal_lm]
        written.pop("auto_map", None)  # names code that does not lie beside a student
        if kept_layers is not None:
            for name in PER_LAYER & written.keys():
                if written[name] is not None:
                    written[name] = [written[name][layer] for layer in kept_layers]
        return written

    def _renamed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` with old names replaced. Raises ConfigError where old and new name disagree."""
        renamed = {name: value for name, value in config.items() if name not in self.aliases}
        for old, new in self.aliases.items():
            value = config.get(old)
            if value is None:
                continue
            if renamed.get(new) not in (None, value):
                raise ConfigError(
                    f"the model's config says {old} = {value} and {new} = {renamed[new]}; remove one"
                )
            renamed[new] = value
        return renamed

    def _refuse_unknown(self, config: Mapping[str, Any], model_type: str) -> None:
        known = {*self.sizes.values(), *self.flags.values(), *self.defaults}
        known |= SILENT | PER_LAYER | self.carried
        known |= set() if self.derives_heads else {"num_key_value_heads", "head_dim"}
        unknown = [
            f"{name} = {value!r}"
            for name, value in config.items()
            if name not in known and value is not None and not self._is_off(name, value)
        ]
        if unknown:
            raise ConfigError(
                f"the model's config has attributes that the table of {model_type} does not know: "
                f"{', '.join(unknown)}; remove them if they have no effect, or add them in "
                f"minitron_ray/models/families/{model_type}.py"
            )

    def _is_off(self, name: str, value: Any) -> bool:
        off = {**SWITCHED_OFF, **self.required_values}
        return name in off and bool(value == off[name])


def late_sliding_window(config: Mapping[str, Any]) -> list[str]:
    """Qwen's types of layers: all full, or with `use_sliding_window` sliding from a layer on."""
    slides = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
    first = config.get("max_window_layers", 28) if slides else math.inf
    return [
        "sliding_attention" if layer >= first else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]


def _refuse_foreign(config: Mapping[str, Any], causal_lm: str) -> None:
    """What would make the weights or the code something else than the stock network."""
    if config.get("quantization_config") is not None:
        raise ConfigError("the model is quantized (quantization_config); give it with plain float weights")
    if (own := _own_network(config.get("auto_map"), causal_lm)) is not None:
        raise ConfigError(
            f"the model brings its own code (auto_map: {own}), which is never run; remove auto_map if stock "
            f"{causal_lm} computes the same"
        )
    architectures = config.get("architectures")
    if architectures and causal_lm not in architectures:
        raise ConfigError(f"the model is a {', '.join(map(str, architectures))}; only {causal_lm} can be cut")


def _own_network(auto_map: Any, causal_lm: str) -> str | None:
    """What `auto_map` names that is not the stock network; None where there is nothing.

    A class of the stock network's name is taken for its copy, which a model carries that was published before
    transformers had the class, as Phi-3 was: had it tensors or attributes of its own, those would be refused.
    """
    if auto_map is None:
        return None
    if not isinstance(auto_map, Mapping):
        return repr(auto_map)
    networks = {name: str(code) for name, code in auto_map.items() if str(name).startswith("AutoModel")}
    named = networks.get("AutoModelForCausalLM")
    if named is not None:
        return None if named.rpartition(".")[2] == causal_lm else named
    return next(iter(networks.values()), None)


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise ConfigError(f"the model's config has no {name}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"the model's config: {name} is {value!r}, must be a whole number of at least 1")
    return value


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"the model's config: {name} is {value!r}, must be true or false")
    return bool(value)
