"""GGUF to a Hugging Face model folder: a Llama's tensors dequantised, its config and tokenizer restored.

A GGUF file says less than a model folder. What is missing is put back, and what can't be is refused:

- epsilon is stored as a float32 and was published as a decimal: the shortest one that gives it back;
- queries and keys were permuted for another rotary layout: permuted back;
- a vocabulary of the byte-level kind is only right with its pre-tokenizer, of which the file holds the name;
- the token that ends a document is not the one that ends a chat turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from minitron_ray.core.errors import ConfigError
from minitron_ray.data.tokenizer import SOURCE, quiet
from minitron_ray.weights.writing import write_checkpoint

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

VERSION: Final = 1
"""Version of the conversion; part of the digest under which its results are kept."""

_SIZES: Final = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OPTIONAL: Final = frozenset(
    {
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    }
)
_HARMLESS: Final[dict[str, Any]] = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none"}
"""Keys that may be there with this value, which says that the feature is not used."""

_TENSORS: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}

_DIGITS_APART: Final = ("smollm", "starcoder", "refact")
_AS_TRANSFORMERS_BUILDS_IT: Final = (
    "default",
    "gpt-2",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "smaug-bpe",
    "tekken",
)
_DOCUMENT_ENDS: Final = ("<|endoftext|>", "<|end_of_text|>", "</s>")
_CONTROL: Final = 3


@dataclass(frozen=True, slots=True)
class _File:
    """A GGUF file's metadata and memory-mapped tensors; `path` is for messages."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    def need(self, key: str) -> Any:
        if key not in self.metadata:
            raise ConfigError(f"{self.path.name} lacks {key}; it is not a complete GGUF model")
        return self.metadata[key]

    def array(self, name: str) -> np.ndarray:
        """A tensor as float32."""
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape.tolist()[::-1])
        # A tensor that is not quantised comes as the read-only map itself, which torch does not take.
        return np.require(values, dtype=np.float32, requirements=["C", "W"])


def convert_gguf(path: Path, folder: Path, sha256: str) -> None:
    """Writes the model folder of a GGUF file: float32 safetensors, config, tokenizer, `source.json`.

    Prints nothing. Raises ConfigError for another architecture, a tensor, a setting or a pre-tokenizer
    that this conversion does not know, and for a damaged file.
    """
    with quiet():
        file = _open(path)
        config = _config(file)
        _check_names(file, config)
        _write_tokenizer(file, config, folder)
        try:
            write_checkpoint(folder, _tensors(file, config), config, dtype="float32")
        except RuntimeError as error:
            raise ConfigError(f"{path.name} is inconsistent: {error}") from error
    ids: dict[str, Any] = {
        name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config
    }
    _write(folder / "generation_config.json", ids)
    about = {name: file.metadata.get(f"general.{name}") for name in ("name", "organization", "license")}
    separator = {"document_separator": _document_separator(file)}
    _write(folder / SOURCE, {"format": "gguf", "sha256": sha256, "conversion": VERSION, **about, **separator})


def _open(path: Path) -> _File:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        file = _File(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path.name} can't be read as GGUF ({error}); it is damaged or no GGUF file"
        ) from error
    architecture = file.need("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{path.name} is a {architecture!r} model; GGUF is read for 'llama' only: "
            "name a folder with safetensors instead"
        )
    return file


def _config(file: _File) -> dict[str, Any]:
    """The `config.json` as the model was published."""
    values = {
        key.removeprefix("llama."): value for key, value in file.metadata.items() if key.startswith("llama.")
    }
    for key, value in values.items():
        if key not in _SIZES and key not in _OPTIONAL and _HARMLESS.get(key, ...) != value:
            raise ConfigError(
                f"{file.path.name} sets llama.{key} = {value!r}, which this conversion would lose; "
                "name a folder with safetensors instead"
            )
        if isinstance(value, list):
            raise ConfigError(
                f"{file.path.name}: llama.{key} differs from layer to layer, which is not supported"
            )
    sizes = {name: int(file.need(f"llama.{key}")) for key, name in _SIZES.items()}
    heads = sizes["num_attention_heads"]
    epsilon = np.float32(file.need("llama.attention.layer_norm_rms_epsilon"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "num_key_value_heads": int(values.get("attention.head_count_kv", heads)),
        "head_dim": int(
            values.get("attention.key_length")
            or values.get("rope.dimension_count")
            or sizes["hidden_size"] // heads
        ),
        "vocab_size": _vocabulary(file),
        "hidden_act": "silu",
        "rms_norm_eps": float(str(epsilon)),
        "rope_theta": float(values.get("rope.freq_base", 10_000.0)),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": _tied(file),
        "dtype": "float32",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := file.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = int(token)
    return config


def _vocabulary(file: _File) -> int:
    """Rows of the embedding, which may be more than there are tokens."""
    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{file.path.name} lacks the tensor token_embd.weight")
    return int(file.tensors["token_embd.weight"].shape[-1])


def _tied(file: _File) -> bool:
    """Whether the LM head is the embedding: it is left out then, or stored twice."""
    if "output.weight" not in file.tensors:
        return True
    head, embedding = file.tensors["output.weight"], file.tensors["token_embd.weight"]
    return head.tensor_type == embedding.tensor_type and np.array_equal(head.data, embedding.data)


def _check_names(file: _File, config: dict[str, Any]) -> None:
    """Raises ConfigError unless the file holds exactly a Llama's tensors."""
    layers = range(config["num_hidden_layers"])
    outer = {name for name in _TENSORS if name.startswith(("token_embd", "output"))}
    expected = outer | {f"blk.{layer}.{name}" for layer in layers for name in _TENSORS.keys() - outer}
    if config["tie_word_embeddings"]:
        expected.discard("output.weight")
    found = set(file.tensors) - ({"output.weight"} if config["tie_word_embeddings"] else set())
    for names, problem in (
        (expected - found, "lacks the tensors"),
        (found - expected, "holds the unknown tensors"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"{file.path.name} {problem} {', '.join(sorted(names)[:3])}{more}")


def _tensors(file: _File, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its Hugging Face name, one in memory at a time."""
    import torch

    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    for name in file.tensors:
        layer = re.match(r"blk\.(\d+)\.", name)
        short = name[layer.end() :] if layer else name
        values = file.array(name)
        if short in heads:
            values = _unpermute(values, heads[short])
        prefix = f"model.layers.{layer[1]}." if layer else ""
        yield prefix + _TENSORS[short], torch.from_numpy(values)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from rotary pairs (0, 1), (2, 3), ... to pairs (0, d/2), (1, d/2 + 1), ..."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _write_tokenizer(file: _File, config: dict[str, Any], folder: Path) -> None:
    """The tokenizer as transformers reads it, with the pre-tokenizer that the file names."""
    from transformers import AutoTokenizer

    kind, rule = file.need("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and rule not in (*_DIGITS_APART, *_AS_TRANSFORMERS_BUILDS_IT):
        raise ConfigError(
            f"{file.path.name} names the pre-tokenizer {rule!r}; known are "
            f"{', '.join(sorted((*_DIGITS_APART, *_AS_TRANSFORMERS_BUILDS_IT)))}; name a folder with "
            "safetensors instead"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as error:  # whatever odd metadata makes the library raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"the tokenizer of {file.path.name} can't be read: {reason}") from error
    if kind == "gpt2" and rule in _DIGITS_APART:
        _split_digits(tokenizer.backend_tokenizer)
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)


def _split_digits(backend: Tokenizer) -> None:
    """Digits one by one, then byte-level BPE, as SmolLM and StarCoder were trained."""
    from tokenizers import pre_tokenizers

    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _document_separator(file: _File) -> int | None:
    """The control token that ends a document; the declared EOS of a chat model ends a turn instead."""
    tokens, types = file.need("tokenizer.ggml.tokens"), file.metadata.get("tokenizer.ggml.token_type", [])
    control = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL
    }
    found = next((control[token] for token in _DOCUMENT_ENDS if token in control), None)
    return found if found is not None else file.metadata.get("tokenizer.ggml.eos_token_id")


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
