"""Tiny networks of every family, and random selections of their units."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from minitron_ray.models.architecture import Architecture
from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family, Tensor
from minitron_ray.models.kept import Kept
from minitron_ray.weights.model import build
from minitron_ray.weights.surgery import cut

IDS = torch.arange(24).reshape(2, 12) * 5 % 64
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **TOKENS,
}
PER_HEAD = {"num_key_value_heads": 6}
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}
# Of head_dim's own making: hidden / heads is not it.
ODD = {"hidden_size": 46}
NEOX = {n: v for n, v in TINY.items() if n not in ("num_key_value_heads", "head_dim")}
GPT2 = {"vocab_size": 64, "n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 32, **TOKENS}
MOE = {**TINY, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATE = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
TWO_ROPES = {"rope_theta": 1e6, "rope_local_base_freq": 100.0, "sliding_window": 4}
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**TINY, "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0},
    "llama-tied": {**TINY, **TIED, "model_type": "llama"},
    "llama-biased": {**TINY, **BIASED, "model_type": "llama", "mlp_bias": True},
    "llama-one-group-a-head": {**TINY, **PER_HEAD, "model_type": "llama"},
    "nemotron": {**TINY, "model_type": "nemotron", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "nemotron-tied-biased": {**TINY, **TIED, **BIASED, "model_type": "nemotron", "mlp_bias": True},
    "mistral": {**TINY, "model_type": "mistral", "sliding_window": 4},
    "mistral-tied": {**TINY, **TIED, **PER_HEAD, **ODD, "model_type": "mistral", "sliding_window": None},
    "qwen2": {**TINY, **ODD, "model_type": "qwen2"},
    "qwen2-tied-window": {**TINY, **TIED, **PER_HEAD, **LATE, "model_type": "qwen2"},
    "qwen3": {**TINY, **ODD, "model_type": "qwen3"},
    "qwen3-tied-biased-window": {
        **TINY,
        **TIED,
        **BIASED,
        **PER_HEAD,
        **LATE,
        "model_type": "qwen3",
    },
    "gemma2": {**TINY, "model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 12}
    | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma2-untied-biased": {**TINY, **BIASED, **PER_HEAD, **NO_CAPS, "model_type": "gemma2"}
    | {"tie_word_embeddings": False, "sliding_window": 4},
    "gemma3_text": {**TINY, **TWO_ROPES, "model_type": "gemma3_text", "sliding_window_pattern": 2},
    "gemma3_text-untied-biased": {**TINY, **TWO_ROPES, **BIASED, **PER_HEAD, "model_type": "gemma3_text"}
    | {"tie_word_embeddings": False, "final_logit_softcapping": 3.0, "sliding_window_pattern": 3},
    "phi3": {**TINY, **ODD, "model_type": "phi3", "sliding_window": 4},
    "phi3-tied-partial": {**TINY, **TIED, **PER_HEAD, "model_type": "phi3", "partial_rotary_factor": 0.5},
    "olmo2": {**TINY, **ODD, "model_type": "olmo2", "rms_norm_eps": 1e-12},
    "olmo2-tied-biased": {**TINY, **TIED, **BIASED, **PER_HEAD, "model_type": "olmo2"}
    | {"rms_norm_eps": 1e-12},
    "gpt_neox": {**NEOX, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 1000},
    "gpt_neox-tied-unbiased": {**NEOX, **TIED, "model_type": "gpt_neox", "attention_bias": False}
    | {"use_parallel_residual": False},
    "gpt2": {**GPT2, "model_type": "gpt2"},
    "gpt2-untied": {**GPT2, "model_type": "gpt2", "tie_word_embeddings": False, "n_inner": 40},
    "qwen3_moe": {**MOE, "model_type": "qwen3_moe", "norm_topk_prob": True},
    "qwen3_moe-tied-biased": {**MOE, **TIED, **BIASED, **PER_HEAD, "model_type": "qwen3_moe"},
}


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    family: Family
    arch: Architecture
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, name: str, **change: Any) -> Case:
        """A network of CONFIGS with random weights, the same every time."""
        config = {**CONFIGS[name], **change}
        family = family_of(config)
        arch = family.read(config)
        source = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(shape, generator=source) * 0.3 for name, shape in family.shapes(arch).items()
        }
        return cls(config, family, arch, weights)

    @property
    def per_head(self) -> bool:
        """Whether every head has keys and values of its own."""
        return self.arch.heads_per_group == 1

    def logits(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return build(config, weights)(input_ids=IDS).logits

    def student_config(self, kept: Kept) -> dict[str, Any]:
        return self.family.student_config(self.config, kept.architecture(self.arch), kept)

    def cut_logits(self, kept: Kept, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        student = cut(weights, self.family, self.arch, kept)
        return self.logits(self.student_config(kept), student)

    def output(self, axis: str) -> list[tuple[str, int]]:
        """Where the units of an axis write to the residual stream: names and the axis's dimension."""
        if axis == "expert_mlp":
            return [("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", 1)]
        dim = "heads*head_dim" if axis == "heads" else axis
        names = [f"{tap.module}.weight" for tap in self.family.taps.get(axis, ())]  # type: ignore[call-overload]
        return [(t.name, t.dims.index(dim)) for t in self.family.tensors if t.name in names]


def some(source: random.Random, size: int, count: int) -> tuple[int, ...]:
    return tuple(sorted(source.sample(range(size), count)))


def random_kept(family: Family, arch: Architecture, seed: int) -> Kept:
    """Any selection on every axis of the family, of sizes that stock transformers takes."""
    source = random.Random(seed)
    layers = some(source, arch.layers, source.randint(1, arch.layers))
    if family.square_heads:
        count = source.randint(1, arch.hidden // arch.head_dim)
        kept = Kept(
            layers=layers,
            hidden=some(source, arch.hidden, count * arch.head_dim),
            heads=tuple(some(source, arch.heads, count) for _ in layers),
        )
    elif arch.heads_per_group == 1:
        count = source.randint(1, arch.heads)
        heads = tuple(some(source, arch.heads, count) for _ in layers)
        kept = Kept(layers=layers, hidden=_some_hidden(source, family, arch, count), heads=heads)
    else:
        groups, share = source.randint(1, arch.kv_heads), source.randint(1, arch.heads_per_group)
        chosen = [some(source, arch.kv_heads, groups) for _ in layers]
        kept = Kept(
            layers=layers,
            hidden=_some_hidden(source, family, arch, groups * share),
            heads=tuple(_some_heads(source, arch, row, share) for row in chosen),
            kv_heads=tuple(tuple((group,) for group in row) for row in chosen),
        )
    return _with_networks(source, kept, arch)


def _some_hidden(source: random.Random, family: Family, arch: Architecture, heads: int) -> tuple[int, ...]:
    divisors = [b if isinstance(b, int) else heads for a, b in family.multiples if a == "hidden"]
    unit = math.lcm(1, *divisors)
    return some(source, arch.hidden, unit * source.randint(1, arch.hidden // unit))


def _some_heads(
    source: random.Random, arch: Architecture, groups: Sequence[int], share: int
) -> tuple[int, ...]:
    size = arch.heads_per_group
    return tuple(group * size + head for group in groups for head in some(source, size, share))


def _with_networks(source: random.Random, kept: Kept, arch: Architecture) -> Kept:
    """`kept` with random MLP neurons, or experts and neurons of them."""
    if arch.mlp:
        mlp = source.randint(1, arch.mlp)
        return replace(kept, mlp=tuple(some(source, arch.mlp, mlp) for _ in kept.layers))
    experts = source.randint(arch.active_experts, arch.experts)
    width = 8 * source.randint(1, arch.expert_mlp // 8)
    return replace(
        kept,
        experts=tuple(some(source, arch.experts, experts) for _ in kept.layers),
        expert_mlp=tuple(
            tuple(some(source, arch.expert_mlp, width) for _ in range(experts)) for _ in kept.layers
        ),
    )


def projections(case: Case, weights: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """Queries, keys and values of a layer as plain matrices (heads, head_dim, inputs), bias last where
    there is one; read off the stock models' forward passes, not off the tables."""
    size = case.arch.head_dim
    found: dict[str, torch.Tensor] = {}
    for part in ("weight", "bias"):
        pieces = _pieces(case.family.model_type, weights, layer, part, size)
        for name, piece in pieces.items():
            matrix = piece.reshape(-1, size, piece.shape[-1] if part == "weight" else 1)
            found[name] = matrix if part == "weight" else torch.cat([found[name], matrix], -1)
    return found


def _pieces(
    model_type: str, weights: dict[str, torch.Tensor], layer: int, part: str, size: int
) -> dict[str, torch.Tensor]:
    match model_type:
        case "gpt2":
            joined = weights[f"transformer.h.{layer}.attn.c_attn.{part}"]
            return dict(zip("qkv", (joined.T if part == "weight" else joined).chunk(3), strict=True))
        case "gpt_neox":
            joined = weights.get(f"gpt_neox.layers.{layer}.attention.query_key_value.{part}")
            if joined is None:
                return {}
            heads = joined.reshape(-1, 3, size, *joined.shape[1:])
            return {name: heads[:, place].flatten(0, 1) for place, name in enumerate("qkv")}
        case "phi3" if part == "weight":
            joined = weights[f"model.layers.{layer}.self_attn.qkv_proj.weight"]
            queries = weights[f"model.layers.{layer}.self_attn.o_proj.weight"].shape[1]
            keys = (len(joined) - queries) // 2
            return dict(zip("qkv", joined.split([queries, keys, keys]), strict=True))
        case _:
            found = {n: weights.get(f"model.layers.{layer}.self_attn.{n}_proj.{part}") for n in "qkv"}
            return {name: piece for name, piece in found.items() if piece is not None}


def is_consumer(case: Case, tensor: Tensor) -> bool:
    """Whether a matrix reads the residual stream, rather than writing to it."""
    if len(tensor.dims) != 2 or "vocab" in tensor.dims or "positions" in tensor.dims:
        return False
    return tensor.dims[0 if case.family.model_type == "gpt2" else 1] == "hidden"
