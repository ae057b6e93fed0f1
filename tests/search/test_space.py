"""The paper's candidate sets (§3.1, §3.2), and what a space says when it does not reach the budget."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.loading import load
from minitron_ray.core.units import Choices
from minitron_ray.experiment import Budget, Experiment, Space
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.budget import Band, Limits, Load
from minitron_ray.models.cost import forward_flops, serving_bytes
from minitron_ray.models.families import family_of
from minitron_ray.results.schemas import TABLES
from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.search.selection import CutRules
from minitron_ray.search.shape import Refusals
from minitron_ray.search.space import Candidate, CandidateRow, enumerate_candidates

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
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


def candidates(config: dict[str, Any], space: Space, band: Band, **rules: Any) -> list[CandidateRow]:
    family = family_of(config)
    return enumerate_candidates(family, family.read(config), space, Limits.on(band), CutRules(**rules))


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


@pytest.mark.parametrize(
    ("file", "cut_from", "budget", "many"),
    [
        ("15b_to_8b", "nemotron-4-15b", None, 15),
        ("15b_to_8b", "nemotron-4-15b", "8B ± 5%", 18),
        ("8b_to_4b", "minitron-8b", None, 18),
        ("8b_to_4b", "minitron-8b", "4B ± 5%", 18),
    ],
)
def test_the_papers_files(file: str, cut_from: str, budget: str | None, many: int) -> None:
    overrides = [] if budget is None else [f"budget.parameters={budget}"]
    experiment, _ = load(EXPERIMENTS / f"{file}.yaml", Experiment, overrides)
    config = json.loads((EXPERIMENTS / "models" / f"{cut_from}.json").read_text())
    assert experiment.budget is not None
    family, limits = family_of(config), experiment.budget.limits(experiment.data.sequence_length)
    rows = enumerate_candidates(family, family.read(config), experiment.searched.space, limits)
    assert len(feasible(rows)) == many


MANY = Space.model_validate(
    {"layers": "3..32", "hidden": "2048..6144 by 256", "heads": "8..48 by 8", "mlp": "4096..24576 by 4096"}
)


def test_tens_of_thousands_of_shapes_are_counted_in_half_a_second() -> None:
    space = MANY
    seconds = []
    for _ in range(3):
        start = time.process_time()
        rows = candidates(NEMOTRON, space, Band.of(8_000_000_000, 0.05))
        seconds.append(time.process_time() - start)
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
    assert reasons[570, 9, 768] == (
        "llama needs hidden to be a multiple of heads, 570 is none of 9; `export: {as: mistral}` takes it"
    )
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
    rows = candidates(SMOLLM2, space, Band(low=core, high=core, measure="non_embedding_parameters"))
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
    assert (
        "20L 576H 9h/3 768m" in text
        and "134.5M parameters (30L 576H 9h/3 1536m)" in text
        and "\n" not in text
    )


def test_a_space_without_a_shape_to_build() -> None:
    with pytest.raises(
        ConfigError, match=r"none of its 2 shapes can be cut from the teacher, .* 7 heads do not"
    ):
        candidates(SMOLLM2, Space.model_validate({"heads": [7, 8]}), Band(low=1, high=9))


def test_ratios_are_for_the_mlp_only() -> None:
    with pytest.raises(ValidationError, match="a ratio to the hidden size is for mlp only"):
        Space(hidden=Choices(ratios=(0.5,)))


# --- Vectorised against one by one -------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "qwen3_moe", "phi3"])
def test_every_row_is_what_its_shape_says_by_itself(model_type: str) -> None:
    family = family_of({"model_type": model_type})
    has = set(family.cut_axes)
    teacher = Architecture(
        family=model_type,
        layers=4,
        hidden=48,
        heads=6,
        kv_heads=3 if "kv_heads" in has else 6,
        head_dim=8,
        mlp=96 if "mlp" in has else 0,
        vocab=101,
        experts=4 if "experts" in has else 0,
        expert_mlp=16 if "expert_mlp" in has else 0,
        active_experts=2 if "experts" in has else 0,
        positions=33 if model_type == "gpt2" else 0,
    )
    # Sizes below, at and above the teacher's; some that do not go together.
    choices = {
        "layers": [2, 4, 5],
        "hidden": [24, 36, 48, 49],
        "heads": [3, 4, 6],
        "kv_heads": [1, 2, 3],
        "mlp": [32, 96, 97],
        "experts": [1, 2, 4],
        "expert_mlp": [8, 10, 32],
    }
    space = Space.model_validate({axis: sizes for axis, sizes in choices.items() if axis in has})
    limits = Limits(
        bands=(Band(low=20_000, high=90_000), Band(low=0, high=10**6, measure="memory_bytes")),
        load=Load(batch=2, length=9),
    )
    rows = enumerate_candidates(family, teacher, space, limits)
    refusals = Refusals(family, teacher)
    assert len({row.candidate.id for row in rows}) == len(rows) > 80
    for row in rows:
        arch = row.candidate.architecture(teacher)
        assert row.parameters == family.parameters(arch)
        assert row.memory_bytes == serving_bytes(family, arch, "bfloat16", batch=2, length=9)
        assert row.flops_per_token == forward_flops(family, arch, 9)
        refused = refusals.of(row.candidate)
        if refused is not None:
            assert row.reason == refused
        else:
            inside = 20_000 <= row.parameters <= 90_000 and row.memory_bytes <= 10**6
            assert row.in_budget == inside and (row.reason is None) == inside
    assert {row.reason is None for row in rows} == {True, False}


# --- Several budgets ----------------------------------------------------------------------------------


def budgeted(budget: dict[str, Any], space: Space) -> list[CandidateRow]:
    family = family_of(NEMOTRON)
    return enumerate_candidates(
        family, family.read(NEMOTRON), space, Budget.model_validate(budget).limits(4096)
    )


def test_all_budgets_hold_at_once() -> None:
    at = {"batch": 8, "length": 4096}
    together = budgeted(
        {"parameters": "7.8B..8.5B", "memory": "<= 18.5GiB", "flops": "<= 15.4B", "at": at}, SPACE_8B
    )
    alone = [
        {row.candidate.id for row in budgeted(budget | {"at": at}, SPACE_8B) if row.in_budget}
        for budget in ({"parameters": "7.8B..8.5B"}, {"memory": "<= 18.5GiB"}, {"flops": "<= 15.4B"})
    ]
    found = {row.candidate.id for row in together if row.in_budget}
    assert found == set.intersection(*alone) and 0 < len(found) < min(map(len, alone))
    largest = next(row for row in together if row.parameters == max(r.parameters for r in together))
    for measure in ("parameters above", "of memory above", "FLOPs a token above"):
        assert measure in (largest.reason or "")


def test_the_load_decides_about_memory() -> None:
    """Nemotron 15B keeps 8 groups of 128: 2 * 32 * 8 * 128 * 2 bytes are 128 KiB a token."""
    space = Space.model_validate({"layers": [32], "mlp": [24576]})
    one, eight = (
        budgeted({"memory": "≥ 1GiB", "at": {"batch": batch, "length": 4096}}, space)[0].memory_bytes
        for batch in (1, 8)
    )
    assert eight - one == 7 * 4096 * 128 * 1024


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (
            {"memory": "<= 2GiB"},
            r"at most 2\.0 GiB of memory \(1 x 4096 tokens in bfloat16\); the space reaches .* change budget\.memory",
        ),
        ({"flops": "1B"}, r"950\.0M to 1\.050B FLOPs a token .* change budget\.flops"),
        (
            {"parameters": "<= 6.5B", "flops": ">= 20B"},
            r"each is reached, but not by one shape together, nearest is .* change budget\.parameters or "
            r"budget\.flops",
        ),
    ],
)
def test_which_budget_is_out_of_reach(budget: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        budgeted(budget, SPACE_8B)
    assert "\n" not in caught.value.message


def test_a_budget_bounds_something() -> None:
    with pytest.raises(ValidationError, match="name at least one of parameters, memory, flops"):
        Budget.model_validate({"tolerance": "5%"})


# --- KV groups ---------------------------------------------------------------------------------------

ANY = Band(low=1, high=10**12)
GROUPS = SMOLLM2 | {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 48}
OWN = GROUPS | {"num_key_value_heads": 12}


def attention(
    config: dict[str, Any], space: dict[str, Any], **rules: Any
) -> dict[tuple[int, int], str | None]:
    """(heads, KV groups) of the space's shapes to the reason against them."""
    rows = candidates(config, Space.model_validate(space), ANY, **rules)
    return {(row.candidate.heads, row.candidate.kv_heads): row.reason for row in rows}


def test_groups_that_are_dropped_take_their_heads_along() -> None:
    assert attention(GROUPS, {"kv_heads": "1..4"}) == {
        (3, 1): None,
        (6, 2): None,
        (9, 3): None,
        (12, 4): None,
    }


def test_groups_that_are_averaged_leave_the_heads() -> None:
    found = attention(GROUPS, {"kv_heads": "1..4"}, kv_groups="mean")
    assert [shape for shape, reason in found.items() if reason is None] == [(12, 1), (12, 2), (12, 4)]
    assert found[12, 3] == (
        "kv_heads 3 does not divide the teacher's 4, of which neighbours are averaged (kv_groups: mean)"
    )


def test_heads_and_groups_together() -> None:
    found = attention(GROUPS, {"heads": [4, 6, 12], "kv_heads": [2, 4]})
    assert found == {
        (4, 2): None,
        (4, 4): None,
        (6, 2): None,
        (6, 4): "6 heads do not divide into 4 KV groups",
        (12, 2): "12 heads in 2 KV groups are 6 a group, the teacher has 3; kv_groups: mean averages groups "
        "instead",
        (12, 4): None,
    }
    assert attention(GROUPS, {"heads": [12], "kv_heads": [2]}, kv_groups="mean") == {(12, 2): None}


def test_heads_with_keys_and_values_of_their_own() -> None:
    assert attention(OWN, {"heads": [6, 12]}) == {(6, 6): None, (12, 12): None}
    assert attention(OWN, {"kv_heads": [6, 12]}) == {(6, 6): None, (12, 12): None}
    assert attention(OWN, {"kv_heads": [6]}, kv_groups="mean") == {(12, 6): None}


def test_counts_follow_the_groups() -> None:
    """Keys and values of a dropped group: 2 matrices of 48 x 576; its three query heads: twice 3 x 48 x 576."""
    less, whole = candidates(GROUPS, Space.model_validate({"kv_heads": [3, 4]}), ANY)
    assert whole.parameters - less.parameters == 30 * 48 * 576 * (2 + 2 * 3)
    less, whole = candidates(GROUPS, Space.model_validate({"kv_heads": [2, 4]}), ANY, kv_groups="mean")
    assert whole.parameters - less.parameters == 30 * 2 * 48 * 576 * 2


def test_shapes_that_merging_cannot_reach_are_left_out() -> None:
    found = attention(GROUPS, {"heads": [4, 8, 12]}, merge_heads="laco")
    assert found == {
        (
            4,
            4,
        ): "merge_heads: laco pairs each head that goes with one that stays, so at most half of 3 can go, "
        "not 2",
        (8, 4): None,
        (12, 4): None,
    }


def test_another_type_is_offered_only_where_it_has_the_biases() -> None:
    space = Space.model_validate({"hidden": [570, 576]})
    plain = candidates(SMOLLM2, space, ANY)[0].reason
    biased = candidates(SMOLLM2 | {"attention_bias": True}, space, ANY)[0].reason
    assert plain is not None and plain.endswith("`export: {as: mistral}` takes it")
    assert biased == "llama needs hidden to be a multiple of heads, 570 is none of 9"
    mistral = SMOLLM2 | {"model_type": "mistral"}
    assert candidates(mistral, space, ANY)[0].reason is None


# --- Experts -----------------------------------------------------------------------------------------

MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": False,
}


def test_experts_and_their_size() -> None:
    rows = candidates(MIXTURE, Space.model_validate({"experts": [3, 4, 8], "expert_mlp": [16, 32]}), ANY)
    found = {(row.candidate.experts, row.candidate.expert_mlp): row for row in rows}
    assert [shape for shape, row in found.items() if row.reason is None] == [
        (4, 16),
        (4, 32),
        (8, 16),
        (8, 32),
    ]
    assert found[3, 32].reason == "3 experts are fewer than the 4 a token goes to"
    # An expert has three matrices, and a row of the router.
    fewer = found[8, 32].parameters - found[4, 32].parameters
    assert fewer == 2 * 4 * (3 * 64 * 32 + 64)
    assert found[8, 32].parameters - found[8, 16].parameters == 2 * 8 * 3 * 64 * 16
    assert found[4, 16].candidate.shape_text() == "2L 64H 4h/2 4e 16m"
    assert len({row.candidate.id for row in rows}) == 6
    assert {row.candidate.mlp for row in rows} == {0}
    assert found[4, 16].row()["experts"] == 4 and found[4, 16].row()["expert_mlp"] == 16


def test_a_space_that_nobody_can_list_is_refused() -> None:
    """Before anything is listed, and with the axis that has most sizes."""
    space = {"layers": "1..30", "hidden": "64..576 by 4", "mlp": "64..1536 by 2"}
    with pytest.raises(
        ConfigError,
        match=r"^search\.space: 30 layers x 129 hidden x 737 mlp are 2,852,190 shapes, more than 500,000; take larger "
        r"steps, above all of mlp$",
    ):
        candidates(SMOLLM2, Space.model_validate(space), ANY)


def test_axes_that_a_family_does_not_have() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^search\.space\.experts: llama has no experts to cut; it has layers, hidden, heads, kv_heads, mlp$",
    ):
        candidates(SMOLLM2, Space.model_validate({"experts": [2]}), ANY)
    with pytest.raises(
        ConfigError, match=r"search\.space\.mlp: qwen3_moe has no mlp to cut; it has layers, "
    ):
        candidates(MIXTURE, Space.model_validate({"mlp": [2]}), ANY)


def test_ids_of_shapes_without_experts_are_those_of_earlier_versions() -> None:
    """Recorded with the version that knew neither KV groups nor experts as axes."""
    shape = Candidate(layers=28, hidden=576, heads=9, kv_heads=3, mlp=1024)
    assert shape.id == "1addc9d17c"
    mixture = Candidate(layers=28, hidden=576, heads=9, kv_heads=3, mlp=1024, experts=2, expert_mlp=8)
    assert mixture.id != shape.id


def test_every_feasible_shape_can_be_proposed() -> None:
    """Each axis with a choice is a parameter of the sampler, and each shape has values of its own."""
    space = Space.model_validate({"kv_heads": [1, 2], "experts": [4, 6, 8], "expert_mlp": [16, 32]})
    rows = candidates(MIXTURE, space, ANY)
    proposals = ShapeProposals.of(rows, space, 64)
    assert [name for name, _ in proposals.axes] == ["kv_heads", "experts", "expert_mlp"]
    assert len(proposals.feasible) == 12
    for name in proposals.feasible:
        assert proposals.nearest(proposals.parameters(name), proposals.feasible) == name
