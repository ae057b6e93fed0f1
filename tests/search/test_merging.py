"""Merged heads: who is paired with whom, and what comes of it (paper §2.1, §10.6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_ray.core.errors import ConfigError
from minitron_ray.importance.scores import Scores
from minitron_ray.models.architecture import Architecture
from minitron_ray.search.selection import CutRules, select
from minitron_ray.search.space import Candidate


def cut(scores: list[float], kv_heads: int, to: int, to_groups: int, **rules: Any) -> Any:
    """The kept heads of a teacher's one layer and what they become, by head."""
    heads = len(scores)
    teacher = Architecture(
        family="llama", layers=1, hidden=1, heads=heads, kv_heads=kv_heads, head_dim=2, mlp=1, vocab=9
    )
    found = Scores(hidden=np.ones(1), heads=np.array([scores], float), mlp=np.ones((1, 1)), layers=np.ones(1))
    shape = Candidate(layers=1, hidden=1, heads=to, kv_heads=to_groups, mlp=1)
    kept = select(found, shape, teacher, CutRules(**rules))
    assert kept.architecture(teacher) == shape.architecture(teacher)
    if not kept.merged_heads:
        return None
    return dict(zip(kept.heads[0], kept.merged_heads[0], strict=True))


def falling(count: int) -> list[float]:
    """Scores in which head h (from 0) has the rank h + 1."""
    return [float(count - head) for head in range(count)]


def pairs(blends: dict[int, Any]) -> set[tuple[int, int]]:
    """(kept, dropped), as ranks from 1, of heads given in the order of rank."""
    return {
        (head + 1, other + 1) for head, blend in blends.items() for other, _ in blend if other not in blends
    }


def test_the_papers_48_to_32() -> None:
    merged = cut(falling(48), 48, 32, 32, merge_heads="paper")
    assert pairs(merged) == {(i, 65 - i) for i in range(17, 33)}
    assert {(17, 48), (32, 33)} <= pairs(merged) and len(pairs(merged)) == 16
    assert all(merged[head] == ((head, 1.0),) for head in range(16)), "ranks 1 to 16 stay themselves"


def test_groups_of_six_to_three() -> None:
    """48 heads in 8 groups to 24: in each group 1 with 6, 2 with 5, 3 with 4."""
    merged = cut(falling(48), 8, 24, 8, merge_heads="mean")
    assert pairs(merged) == {(6 * g + a, 6 * g + b) for g in range(8) for a, b in [(1, 6), (2, 5), (3, 4)]}


def test_pairs_follow_the_scores_and_not_the_order_of_heads() -> None:
    merged = cut([3.0, 1.0, 4.0, 2.0], 1, 2, 1, merge_heads="paper")
    # Ranks: head 2, head 0, head 3, head 1. The second (0) goes with the third (3), the first with the last.
    assert merged == {2: ((2, 2.0), (1, -1.0)), 0: ((0, 2.0), (3, -1.0))}


FORMULAS = {
    "paper": lambda i, j: i + (i - j),
    "laco": lambda i, j: i + sum(other - i for other in [j]),
    "mean": lambda i, j: (i + j) / 2,
}


@given(st.sampled_from(sorted(FORMULAS)), st.integers(2, 12), st.data())
def test_blends_are_the_formulas(rule: str, heads: int, data: Any) -> None:
    """On random matrices, against the formula of each rule in the paper's own indices."""
    to = data.draw(st.integers((heads + 1) // 2, heads - 1))
    source = np.random.default_rng(heads * 100 + to)
    weights, scores = source.normal(size=(heads, 3)), source.permutation(heads).astype(float)
    ranked = weights[np.argsort(-scores)]
    expected = [
        FORMULAS[rule](ranked[i - 1], ranked[2 * to - i]) if 2 * to - i + 1 <= heads else ranked[i - 1]
        for i in range(1, to + 1)
    ]
    merged = cut(scores.tolist(), heads, to, to, merge_heads=rule)
    found = {head: sum(weight * weights[unit] for unit, weight in blend) for head, blend in merged.items()}
    in_rank_order = [found[head] for head in sorted(found, key=lambda head: -scores[head])]
    np.testing.assert_allclose(in_rank_order, expected)


def test_laco_is_the_dropped_head() -> None:
    assert cut(falling(4), 1, 2, 1, merge_heads="laco") == {0: ((3, 1.0),), 1: ((2, 1.0),)}


@pytest.mark.parametrize(
    ("kv_heads", "to", "to_groups", "rules"),
    [
        (8, 4, 4, {"merge_heads": "none"}),
        (4, 8, 4, {"merge_heads": "paper"}),  # nothing goes
        (4, 4, 2, {"merge_heads": "paper"}),  # whole groups go; their heads attend through other keys
    ],
)
def test_nothing_is_merged(kv_heads: int, to: int, to_groups: int, rules: dict[str, Any]) -> None:
    assert cut(falling(8), kv_heads, to, to_groups, **rules) is None


def test_averaged_groups_merge_inside_their_pool() -> None:
    merged = cut(falling(8), 4, 4, 2, merge_heads="mean", kv_groups="mean")
    assert pairs(merged) == {(1, 4), (2, 3), (5, 8), (6, 7)}


@pytest.mark.parametrize("rule", sorted(FORMULAS))
def test_half_can_go_and_no_more(rule: str) -> None:
    assert len(cut(falling(48), 48, 24, 24, merge_heads=rule)) == 24
    with pytest.raises(ConfigError, match=rf"merge_heads: {rule} pairs .* at most half of 48 can go, not 25"):
        cut(falling(48), 48, 23, 23, merge_heads=rule)
    with pytest.raises(ConfigError, match=r"at most half of 6 can go, not 4"):
        cut(falling(48), 8, 16, 8, merge_heads=rule)


def test_keys_and_values_are_not_merged_and_averaged_at_once() -> None:
    with pytest.raises(ConfigError, match=r"merge_heads: paper would merge keys .* use one of the two"):
        cut(falling(8), 8, 4, 2, merge_heads="paper", kv_groups="mean")
