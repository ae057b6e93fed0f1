"""The paper's candidate sets (§3.1, §3.2), and what a space says when it does not reach the budget."""

from __future__ import annotations

import time
from typing import Any

import pytest

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.units import Choices
from minitron_ray.experiment import Space
from minitron_ray.models.budget import Band
from minitron_ray.models.families import family_of
from minitron_ray.results.schemas import TABLES
from minitron_ray.search.space import Candidate, CandidateRow, enumerate_candidates

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
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
RATIOS = {"ratio": [2.5, 3, 3.5, 4]}
SPACE_8B = Space.model_validate(
    {"layers": "29..32", "hidden": [4096, 4608, 5120, 5632, 6144], "heads": [32, 48], "mlp": RATIOS}
)
SPACE_4B = Space.model_validate(
    {"layers": "29..32", "hidden": [2560, 3072, 3584, 4096, 4608], "heads": [24, 32, 48], "mlp": RATIOS}
)
TABLE_19 = {
    (32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096),
    (31, 32, 12800, 5120), (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096),
    (30, 32, 12800, 5120), (30, 32, 16128, 4608), (30, 48, 13824, 4608), (30, 48, 16384, 4096),
    (29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608),
}  # fmt: skip


def candidates(config: dict[str, Any], space: Space, band: Band) -> list[CandidateRow]:
    family = family_of(config)
    return enumerate_candidates(family, family.read(config), space, band)


def feasible(rows: list[CandidateRow]) -> set[tuple[int, int, int, int]]:
    shapes = [row.candidate for row in rows if row.in_budget]
    return {(shape.layers, shape.heads, shape.mlp, shape.hidden) for shape in shapes}


def test_the_4b_set_has_18_with_minitron_4b_the_largest() -> None:
    rows = candidates(NEMOTRON, SPACE_4B, Band.of(4_000_000_000, 0.05))
    assert len(rows) == 4 * 5 * 3 * 4
    assert len(feasible(rows)) == 18
    largest = max((row for row in rows if row.in_budget), key=lambda row: row.parameters)
    assert largest.candidate == Candidate(layers=32, hidden=3072, heads=24, kv_heads=8, mlp=9216)
    assert largest.parameters == 4_190_509_056


def test_the_8b_set_is_table_19() -> None:
    rows = candidates(NEMOTRON, SPACE_8B, Band(low=7_800_000_000, high=8_500_000_000))
    assert feasible(rows) == TABLE_19
    assert len(feasible(candidates(NEMOTRON, SPACE_8B, Band.of(8_000_000_000, 0.05)))) == 18


def test_a_tens_of_thousands_space_is_counted_in_half_a_second() -> None:
    space = Space.model_validate(
        {
            "layers": "3..32",
            "hidden": "2048..6144 by 256",
            "heads": "8..48 by 8",
            "mlp": "4096..24576 by 4096",
        }
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        rows = candidates(NEMOTRON, space, Band.of(8_000_000_000, 0.05))
        seconds.append(time.perf_counter() - start)
    assert len(rows) == 30 * 17 * 6 * 6 > 17_000
    assert min(seconds) < 0.5


def test_every_shape_comes_with_a_reason_or_is_in_budget() -> None:
    space = Space.model_validate({"hidden": [540, 570, 576], "heads": [6, 8, 9], "mlp": [768, 1536, 2048]})
    rows = candidates(SMOLLM2, space, Band.of(95_000_000, 0.05))
    assert len(rows) == 27 and all(row.in_budget == (row.reason is None) for row in rows)
    reasons = {
        (shape.hidden, shape.heads, shape.mlp): row.reason for row in rows for shape in [row.candidate]
    }
    assert reasons[576, 9, 2048] == "mlp 2048 is above the teacher's 1536"
    assert reasons[576, 8, 768] == "8 heads do not divide into 3 KV groups"
    assert reasons[570, 9, 768] == "llama needs hidden to be a multiple of heads, 570 is none of 9"
    assert "above the budget" in (reasons[576, 9, 1536] or "")
    assert "below the budget" in (reasons[540, 6, 768] or "")
    assert all(set(row.row()) == set(TABLES["candidates"].names) for row in rows)


def test_an_axis_not_named_keeps_the_teachers_size() -> None:
    rows = candidates(SMOLLM2, Space.model_validate({"mlp": [1024, 1280]}), Band.of(115_000_000, 0.2))
    assert [row.candidate.mlp for row in rows] == [1024, 1280]
    assert all(
        (row.candidate.layers, row.candidate.hidden, row.candidate.heads) == (30, 576, 9) for row in rows
    )


def test_ratios_are_of_the_students_hidden_size() -> None:
    space = Space.model_validate({"hidden": [540, 576], "mlp": {"ratio": [2]}})
    rows = candidates(SMOLLM2, space, Band(low=1, high=10**9))
    assert [(row.candidate.hidden, row.candidate.mlp) for row in rows] == [(540, 1080), (576, 1152)]


def test_non_embedding_budgets_count_without_the_embedding() -> None:
    space = Space.model_validate({"mlp": [1024, 1536]})
    core = 134_515_008 - 49152 * 576
    rows = candidates(SMOLLM2, space, Band(low=core, high=core, count="non_embedding"))
    assert [row.in_budget for row in rows] == [False, True]
    assert rows[1].non_embedding_parameters == core


def test_ids_are_of_the_shape_alone() -> None:
    shape = Candidate(layers=1, hidden=2, heads=3, kv_heads=3, mlp=5)
    assert shape.id == Candidate(mlp=5, layers=1, hidden=2, heads=3, kv_heads=3).id
    ids = {row.candidate.id for row in candidates(NEMOTRON, SPACE_4B, Band.of(4_000_000_000, 0.05))}
    assert len(ids) == 240 and all(len(name) == 10 and int(name, 16) >= 0 for name in ids)


def test_a_budget_out_of_reach_names_what_is_reachable() -> None:
    space = Space.model_validate({"layers": "20..30", "mlp": [768, 1536]})
    with pytest.raises(
        ConfigError, match=r"^budget: no shape of search\.space has 47\.5M to 52\.5M"
    ) as caught:
        candidates(SMOLLM2, space, Band.of(50_000_000, 0.05))
    text = caught.value.message
    assert "20L 576H 9h 768m" in text and "134.5M (30L 576H 9h 1536m)" in text and "\n" not in text


def test_a_space_without_a_shape_to_build() -> None:
    with pytest.raises(
        ConfigError, match=r"none of its 2 shapes can be cut from the teacher, .* 7 heads do not"
    ):
        candidates(SMOLLM2, Space.model_validate({"heads": [7, 8]}), Band(low=1, high=9))


def test_ratios_are_for_the_mlp_only() -> None:
    space = Space.model_construct(layers=None, heads=None, mlp=None, hidden=Choices(ratios=(0.5,)))
    with pytest.raises(
        ConfigError, match=r"search\.space\.hidden: a ratio to the hidden size is for mlp only"
    ):
        candidates(SMOLLM2, space, Band(low=1, high=9))
