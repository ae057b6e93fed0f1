"""What a network costs, by arithmetic: floating-point operations a token, and bytes.

A multiplication and an addition are two operations. Norms, activations, rotary positions and the
softmax are left out: they grow with the sizes, not with their products.
"""

from __future__ import annotations

from typing import Final

from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family

BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes a value, by the name of its type."""

TRAINING_STATE_BYTES: Final = 16
"""Bytes a parameter in training, in float32: the weight, its gradient and Adam's two moments."""


def matrix_parameters(family: Family, arch: Architecture) -> int:
    """Parameters that multiply every token: the layers' matrices, of experts those a token goes to, and
    the LM head, tied or not; neither the embedding, which is looked up, nor norms and biases, which are
    added."""
    count = arch.hidden * arch.vocab
    for tensor in family.tensors:
        if len(tensor.dims) == 2 and tensor.per_layer and tensor.exists(arch):
            rows, columns = family.shape(tensor, arch)
            count += arch.layers * rows * columns * (arch.active_experts if tensor.per_expert else 1)
    return count


def forward_flops(family: Family, arch: Architecture, sequence_length: int) -> int:
    """Operations a token of one forward pass with the LM head, averaged over the sequence.

    2 · matrix parameters + layers · 4 · heads·head_dim · (sequence_length + 1)/2: scores and weighted
    values over the tokens that causal attention sees, on average half the sequence.
    """
    attention = 2 * arch.heads * arch.head_dim * (sequence_length + 1)
    return 2 * matrix_parameters(family, arch) + arch.layers * attention


def head_flops(arch: Architecture) -> int:
    """Operations a token of the LM head: final hidden states to logits."""
    return 2 * arch.hidden * arch.vocab


def body_flops(family: Family, arch: Architecture, sequence_length: int) -> int:
    """Operations a token of one forward pass up to the final hidden states, without the LM head."""
    return forward_flops(family, arch, sequence_length) - head_flops(arch)


def training_flops(family: Family, arch: Architecture, sequence_length: int) -> int:
    """Operations a token of forward and backward pass: three times the forward pass (without
    activation checkpointing)."""
    return 3 * forward_flops(family, arch, sequence_length)


def weight_bytes(family: Family, arch: Architecture, dtype: str) -> int:
    """Size of the weights. Raises KeyError for a type that is not in `BYTES`."""
    return family.parameters(arch) * BYTES[dtype]


def serving_bytes(family: Family, arch: Architecture, dtype: str, *, batch: int, length: int) -> int:
    """Weights, and keys and values of `batch` sequences of `length` tokens; an upper bound where layers
    attend to a window. Raises KeyError for a type that is not in `BYTES`."""
    cache = 2 * arch.layers * arch.kv_heads * arch.head_dim * batch * length
    return weight_bytes(family, arch, dtype) + cache * BYTES[dtype]


def training_bytes(family: Family, arch: Architecture) -> int:
    """Weights, gradients and optimizer state over all workers, without activations."""
    return family.parameters(arch) * TRAINING_STATE_BYTES


def activation_bytes(arch: Architecture, dtype: str, *, recompute: bool = False) -> int:
    """Bytes a token that the layers keep for the backward pass; with `recompute` their inputs alone, and all
    of the one layer that is computed again.

    A layer keeps the residual stream and its normalised values at both norms (four times `hidden` in
    float32); in the type of the products what went into them, queries, keys, values and what attention
    made of them, and of an MLP with a gate four values a neuron. Under bfloat16 each product of one input
    has its own copy of it.
    """
    size = BYTES[dtype]
    copies = 2 if dtype == "float32" else 5
    attention = 2 * (arch.heads + arch.kv_heads) * arch.head_dim
    neurons = arch.mlp + arch.active_experts * arch.expert_mlp
    layer = 16 * arch.hidden + size * (copies * arch.hidden + attention + 4 * neurons)
    return arch.layers * 4 * arch.hidden + layer if recompute else arch.layers * layer
