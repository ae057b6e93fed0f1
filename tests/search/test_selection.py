from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_ray.core.errors import MinitronError
from minitron_ray.importance.scores import Scores
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.kept import Kept
from minitron_ray.search.selection import select
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
    [(shape(hidden=6), "6 of 5 units"), (shape(mlp=0), "0 of 4"), (shape(heads=3), "3 heads do not divide")],
)
def test_shapes_that_do_not_fit(wrong: Candidate, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(scores(), wrong, TEACHER)
