"""What a student keeps: layers, channels, neurons, heads and KV groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_ray.core.errors import ConfigError, MinitronError
from minitron_ray.importance.scores import Scores
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.kept import Kept
from minitron_ray.search.selection import CutRules, select
from minitron_ray.search.space import Candidate

TEACHER = Architecture(family="llama", layers=3, hidden=5, heads=6, kv_heads=2, head_dim=2, mlp=4, vocab=9)


def scores(**changed: object) -> Scores:
    values = {
        "hidden": np.array([0.5, 0.1, 0.9, 0.3, 0.7]),
        "heads": np.array([[1, 5, 3, 90, 80, 70], [3, 2, 1, 1, 2, 3], [0, 9, 8, 0, 9, 8]], float),
        "mlp": np.array([[4, 3, 2, 1], [1, 2, 3, 4], [1, 3, 1, 3]], float),
        "layers": np.array([0.9, 0.2, 0.4]),
    }
    return Scores(**(values | changed))  # type: ignore[arg-type]


def shape(layers: int = 3, hidden: int = 5, heads: int = 6, mlp: int = 4) -> Candidate:
    return Candidate(layers=layers, hidden=hidden, heads=heads, kv_heads=2, mlp=mlp)


def test_the_best_units_stay_per_layer_and_per_group() -> None:
    kept = select(scores(), shape(layers=2, hidden=3, heads=4, mlp=2), TEACHER)
    assert kept == Kept(
        layers=(0, 2),  # layer 1 has the lowest score
        hidden=(0, 2, 4),
        heads=((1, 2, 3, 4), (1, 2, 4, 5)),  # two of 0..2 and two of 3..5, however high the others
        mlp=((0, 1), (1, 3)),
    )


def test_ties_go_to_the_first() -> None:
    equal = scores(hidden=np.zeros(5), mlp=np.ones((3, 4)), heads=np.ones((3, 6)), layers=np.ones(3))
    kept = select(equal, shape(layers=2, hidden=2, heads=2, mlp=3), TEACHER)
    assert (kept.layers, kept.hidden, kept.heads[0], kept.mlp[0]) == ((0, 1), (0, 1), (0, 3), (0, 1, 2))


def test_the_full_shape_keeps_everything() -> None:
    assert select(scores(), shape(), TEACHER) == Kept.whole(TEACHER)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_any_shape_gives_an_admissible_selection(
    seed: int, layers: int, hidden: int, share: int, mlp: int
) -> None:
    source = np.random.default_rng(seed)
    drawn = scores(
        hidden=source.integers(0, 3, 5).astype(float),
        heads=source.integers(0, 3, (3, 6)).astype(float),
        mlp=source.integers(0, 3, (3, 4)).astype(float),
        layers=source.integers(0, 3, 3).astype(float),
    )
    candidate = shape(layers, hidden, 2 * share, mlp)
    kept = select(drawn, candidate, TEACHER)
    assert kept.architecture(TEACHER) == candidate.architecture(TEACHER)
    dropped = set(range(5)) - set(kept.hidden)
    assert all(drawn.hidden[d] <= drawn.hidden[k] for d in dropped for k in kept.hidden)


def test_scores_that_are_not_numbers() -> None:
    mlp = np.ones((3, 4))
    mlp[1, 2] = np.nan
    with pytest.raises(MinitronError, match=r"score of mlp \[1, 2\] is not a finite number"):
        select(scores(mlp=mlp), shape(), TEACHER)


def test_scores_of_another_teacher() -> None:
    with pytest.raises(ValueError, match=r"scores of heads have shape \(3, 5\), the teacher has \(3, 6\)"):
        select(scores(heads=np.ones((3, 5))), shape(), TEACHER)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(shape(hidden=6), "hidden: 6 of 5 units"), (shape(mlp=0), "mlp: 0 of 4"), (shape(layers=0), "0 of 3")],
)
def test_shapes_that_do_not_fit(wrong: Candidate, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(scores(), wrong, TEACHER)


def test_heads_that_the_rules_cannot_cut() -> None:
    with pytest.raises(
        ConfigError, match=r"can't cut 3L 5H 3h/2 4m .* 3 heads do not divide into 2 KV groups"
    ):
        select(scores(), shape(heads=3), TEACHER)


# --- Layers ------------------------------------------------------------------------------------------


def test_the_block_with_the_lowest_score_goes() -> None:
    """Not the two lowest layers, 1 and 2, whatever the single scores say."""
    blocks = {2: np.array([0.1, 0.3])}
    assert select(scores(blocks=blocks), shape(layers=1), TEACHER).layers == (2,)
    # One layer less is no block of two: single scores decide.
    assert select(scores(blocks=blocks), shape(layers=2), TEACHER).layers == (0, 2)
    assert select(scores(blocks=blocks), shape(layers=3), TEACHER).layers == (0, 1, 2)
    equal = {2: np.zeros(2)}
    assert select(scores(blocks=equal), shape(layers=1), TEACHER).layers == (0,), "the first stays"


def test_where_only_blocks_were_scored() -> None:
    only = scores(layers=np.full(3, np.nan), blocks={2: np.array([0.3, 0.1])})
    assert select(only, shape(layers=1), TEACHER).layers == (0,)
    assert select(only, shape(), TEACHER).layers == (0, 1, 2)
    with pytest.raises(
        ConfigError, match=r"only blocks of 2 layers were scored, but 1 of 3 layers are to go"
    ):
        select(only, shape(layers=2), TEACHER)


def test_units_scored_without_layers() -> None:
    only = scores(layers=np.full(3, np.nan))
    assert select(only, shape(hidden=2), TEACHER).hidden == (2, 4)
    with pytest.raises(ConfigError, match=r"layers were not scored, but 1 of 3 layers are to go"):
        select(only, shape(layers=2), TEACHER)


def test_blocks_that_are_not_numbers_or_of_another_teacher() -> None:
    with pytest.raises(MinitronError, match=r"score of blocks of 2 layers \[1\] is not a finite number"):
        select(scores(blocks={2: np.array([0.1, np.inf])}), shape(layers=1), TEACHER)
    with pytest.raises(ValueError, match=r"blocks of 2 layers have shape \(3,\), the teacher has \(2,\)"):
        select(scores(blocks={2: np.zeros(3)}), shape(layers=1), TEACHER)


# --- Axes that were not scored -----------------------------------------------------------------------


def test_an_axis_needs_scores_only_where_it_is_cut() -> None:
    kept = select(scores(mlp=None), shape(hidden=2), TEACHER)
    assert kept.mlp == ((0, 1, 2, 3),) * 3
    with pytest.raises(
        ConfigError, match=r"mlp was not scored, so 3 of 4 can't be chosen; take a width metric"
    ):
        select(scores(mlp=None), shape(mlp=3), TEACHER)


# --- KV groups ---------------------------------------------------------------------------------------

GROUPED = Architecture(family="llama", layers=1, hidden=1, heads=8, kv_heads=4, head_dim=2, mlp=1, vocab=9)
MEAN = CutRules(kv_groups="mean")


def grouped(heads: list[float], groups: list[float] | None = None) -> Scores:
    return Scores(
        hidden=np.ones(1),
        heads=np.array([heads], float),
        mlp=np.ones((1, 1)),
        layers=np.ones(1),
        kv_heads=None if groups is None else np.array([groups], float),
    )


def cut_heads(heads: int, kv_heads: int) -> Candidate:
    return Candidate(layers=1, hidden=1, heads=heads, kv_heads=kv_heads, mlp=1)


def test_dropped_groups_take_their_heads_along() -> None:
    """Group 1 has the best head, but the best two heads together are those of 0 and 3 (L2: 7.1, 9, 5, 9.2)."""
    values = [5, 5, 9, 0, 3, 4, 7, 6]
    by_heads = select(grouped(values), cut_heads(4, 2), GROUPED)
    assert (by_heads.kv_heads, by_heads.heads) == ((((1,), (3,)),), ((2, 3, 6, 7),))
    by_groups = select(grouped(values, [1, 0, 2, 0.5]), cut_heads(4, 2), GROUPED)
    assert (by_groups.kv_heads, by_groups.heads) == ((((0,), (2,)),), ((0, 1, 4, 5),))
    fewer = select(grouped(values, [1, 0, 2, 0.5]), cut_heads(2, 2), GROUPED)
    assert (fewer.kv_heads, fewer.heads) == ((((0,), (2,)),), ((0, 5),)), "the best head of each kept group"


def test_averaged_groups_pool_their_heads() -> None:
    kept = select(grouped([1, 2, 9, 8, 7, 0, 6, 5]), cut_heads(4, 2), GROUPED, MEAN)
    assert (kept.kv_heads, kept.heads) == ((((0, 1), (2, 3)),), ((2, 3, 4, 6),))
    every = select(grouped([1, 2, 9, 8, 7, 0, 6, 5]), cut_heads(8, 2), GROUPED, MEAN)
    assert (every.kv_heads, every.heads) == ((((0, 1), (2, 3)),), (tuple(range(8)),))
    assert every.architecture(GROUPED) == cut_heads(8, 2).architecture(GROUPED)


@pytest.mark.parametrize("rules", [CutRules(), MEAN])
def test_groups_that_all_stay_are_not_mentioned(rules: CutRules) -> None:
    assert select(grouped([1, 2, 3, 4, 5, 6, 7, 8]), cut_heads(4, 4), GROUPED, rules).kv_heads == ()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rules", "message"),
    [
        (
            6,
            2,
            CutRules(),
            r"6 heads in 2 KV groups are 3 a group, the teacher has 2; kv_groups: mean averages",
        ),
        (6, 3, MEAN, r"kv_heads 3 does not divide the teacher's 4, of which neighbours are averaged"),
        (3, 2, MEAN, r"3 heads do not divide into 2 KV groups"),
    ],
)
def test_groups_that_cannot_be_cut(heads: int, kv_heads: int, rules: CutRules, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(grouped([1] * 8), cut_heads(heads, kv_heads), GROUPED, rules)


OWN = Architecture(family="llama", layers=1, hidden=1, heads=4, kv_heads=4, head_dim=2, mlp=1, vocab=9)


def test_heads_with_keys_and_values_of_their_own_are_one_ranking() -> None:
    kept = select(grouped([1, 9, 8, 2]), cut_heads(2, 2), OWN)
    assert (kept.heads, kept.kv_heads) == (((1, 2),), ())
    assert kept.architecture(OWN) == cut_heads(2, 2).architecture(OWN)
    averaged = select(grouped([1, 9, 8, 2]), cut_heads(4, 2), OWN, MEAN)
    assert (averaged.heads, averaged.kv_heads) == (((0, 1, 2, 3),), (((0, 1), (2, 3)),))
    with pytest.raises(ConfigError, match=r"4 heads in 2 KV groups are 2 a group, the teacher has 1"):
        select(grouped([1, 9, 8, 2]), cut_heads(4, 2), OWN)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["drop", "mean"]), st.integers(1, 4), st.integers(1, 8))
def test_whatever_heads_can_be_cut_give_the_shape(seed: int, rule: str, kv_heads: int, share: int) -> None:
    """`Kept.architecture` checks that the heads go with the groups and counts what is left."""
    candidate = cut_heads(min(kv_heads * share, 8), kv_heads)
    drawn = grouped(np.random.default_rng(seed).integers(0, 3, 8).tolist())
    try:
        kept = select(drawn, candidate, GROUPED, CutRules(kv_groups=rule))  # type: ignore[arg-type]
    except ConfigError:
        return
    assert kept.architecture(GROUPED) == candidate.architecture(GROUPED)


# --- Experts -----------------------------------------------------------------------------------------

MIXTURE = Architecture(
    family="qwen3_moe", layers=2, hidden=1, heads=1, kv_heads=1, head_dim=2, mlp=0, vocab=9,
    experts=3, expert_mlp=3, active_experts=2,
)  # fmt: skip
EXPERTS = Scores(
    hidden=np.ones(1),
    heads=np.ones((2, 1)),
    layers=np.array([1.0, 2.0]),
    experts=np.array([[1, 3, 2], [9, 7, 8]], float),
    expert_mlp=np.array([[[9, 0, 9], [1, 2, 3], [3, 2, 1]], [[1, 3, 2], [9, 9, 9], [5, 0, 6]]], float),
)


def mixture(layers: int = 2, experts: int = 3, expert_mlp: int = 3) -> Candidate:
    return Candidate(
        layers=layers, hidden=1, heads=1, kv_heads=1, mlp=0, experts=experts, expert_mlp=expert_mlp
    )


def test_the_best_experts_of_each_layer_and_the_best_neurons_of_each_of_them() -> None:
    kept = select(EXPERTS, mixture(experts=2, expert_mlp=2), MIXTURE)
    assert kept.experts == ((1, 2), (0, 2)) and kept.mlp == ()
    assert kept.expert_mlp == (((1, 2), (0, 1)), ((1, 2), (0, 2)))
    assert kept.architecture(MIXTURE) == mixture(experts=2, expert_mlp=2).architecture(MIXTURE)


def test_one_axis_of_a_mixture_at_a_time() -> None:
    fewer = select(EXPERTS, mixture(layers=1, experts=2), MIXTURE)
    assert (fewer.layers, fewer.experts, fewer.expert_mlp) == ((1,), ((0, 2),), ())
    thinner = select(EXPERTS, mixture(expert_mlp=1), MIXTURE)
    assert (thinner.experts, thinner.expert_mlp) == ((), (((0,), (2,), (0,)), ((1,), (0,), (2,))))
    assert select(EXPERTS, mixture(), MIXTURE) == Kept.whole(MIXTURE)


def test_experts_that_are_not_in_the_shape_or_were_not_scored() -> None:
    with pytest.raises(ValueError, match="experts: 0 of 3 units can't be kept"):
        select(EXPERTS, mixture(experts=0), MIXTURE)
    unscored = Scores(hidden=np.ones(1), heads=np.ones((2, 1)), layers=np.ones(2), experts=np.ones((2, 3)))
    with pytest.raises(ConfigError, match="expert_mlp was not scored, so 2 of 3 can't be chosen"):
        select(unscored, mixture(expert_mlp=2), MIXTURE)
