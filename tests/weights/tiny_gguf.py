"""`write_gguf`: the tiny Llama of the fixtures as a GGUF file, as llama.cpp's converter writes one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
HEADS = {"attn_q.weight": 6, "attn_k.weight": 3}


def write_gguf(
    model: Path,
    path: Path,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    quantized: bool = False,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: str = "",
) -> Path:
    """`quantized` stores down_proj as Q8_0; `extra` adds metadata, `tensors` adds, `without` drops tensors."""
    config = json.loads((model / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, GGUFValueType.get_type(value))
    _add_tokenizer(writer, model, pre)
    for name, values in {**_renamed(load_file(model / "model.safetensors")), **(tensors or {})}.items():
        if name == without:
            continue
        if quantized and name.endswith("ffn_down.weight"):
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, model: Path, pre: str) -> None:
    """Byte-level BPE of a chat model: `<|endoftext|>` ends a document, the declared EOS is another token."""
    saved = json.loads((model / "tokenizer.json").read_text())["model"]
    tokens = sorted(saved["vocab"], key=saved["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in saved["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(255)


def _renamed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name, values in weights.items():
        layer, short = "", name
        if name.startswith("model.layers."):
            _, _, number, short = name.split(".", 3)
            layer = f"blk.{number}."
        renamed = NAMES[short]
        if renamed in HEADS:  # as in convert_hf_to_gguf.py
            heads = HEADS[renamed]
            rows, columns = values.shape
            values = (
                values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
            )
        found[layer + renamed] = np.ascontiguousarray(values)
    return found
