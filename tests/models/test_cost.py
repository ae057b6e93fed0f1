from __future__ import annotations

import pytest

from minitron_ray.models import cost
from minitron_ray.models.families import family_of

NEMOTRON = {
    "model_type": "nemotron",
    "vocab_size": 256000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
FAMILY = family_of(NEMOTRON)
TEACHER = FAMILY.read(NEMOTRON)


def test_forward_flops_by_hand() -> None:
    attention, mlp, head = 88_080_384, 301_989_888, 256_000 * 6144  # paper §7, per layer
    assert cost.matrix_parameters(FAMILY, TEACHER) == 32 * (attention + mlp) + head
    scores = 32 * 4 * 6144 * (4096 + 1) // 2
    assert cost.forward_flops(FAMILY, TEACHER, 4096) == 2 * (32 * (attention + mlp) + head) + scores


def test_agrees_with_the_papers_figure_for_a_step() -> None:
    """4.4e17 for the 15B at 1152 sequences of 4096, by the paper's 6 N a token: ours leaves the
    embedding out and counts attention."""
    step = cost.training_flops(FAMILY, TEACHER, 4096) * 1152 * 4096
    assert step == pytest.approx(4.4e17, rel=0.05)


def test_a_tied_head_still_multiplies() -> None:
    tied = FAMILY.read({**NEMOTRON, "tie_word_embeddings": True})
    assert cost.matrix_parameters(FAMILY, tied) == cost.matrix_parameters(FAMILY, TEACHER)


def test_bytes() -> None:
    assert cost.weight_bytes(FAMILY, TEACHER, "bfloat16") == 2 * 15_628_775_424
    assert cost.training_bytes(FAMILY, TEACHER) == 16 * 15_628_775_424
    with pytest.raises(KeyError, match="int8"):
        cost.weight_bytes(FAMILY, TEACHER, "int8")
