"""What a search is judged against: which shapes each baseline trains, by rules that need no search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np

from minitron_ray.search.space import CandidateRow

Baseline = Literal["random", "largest_first", "magnitude", "scratch"]
"""random: as many shapes as the search's tokens pay for, drawn by lot, each trained to the end.
largest_first: of the largest shapes the one whose undistilled cut is best, trained.
magnitude: the winner's shape, cut by the size of weights. scratch: its shape, from random weights."""

BASELINES: Final[tuple[Baseline, ...]] = ("random", "largest_first", "magnitude", "scratch")
LARGEST: Final = 10
"""Shapes whose undistilled cuts `largest_first` compares."""


def affordable(spent: int, each: int, shapes: int) -> int:
    """How many of `shapes` are trained to the end, `each` tokens long, for what a search has `spent`.

    Rounded up, so that the lot never has fewer tokens than the search.
    """
    return min(max(1, math.ceil(spent / each)), shapes)


def drawn(feasible: Sequence[CandidateRow], count: int, seed: int) -> list[CandidateRow]:
    """`count` shapes by lot, none twice; a larger count adds to the same draw."""
    order = np.random.default_rng([seed, 2]).permutation(len(feasible))
    return [feasible[place] for place in order[:count]]


def largest(feasible: Sequence[CandidateRow], *, non_embedding: bool = False) -> list[CandidateRow]:
    """The LARGEST shapes by parameters, the largest first; among equals in the order of their ids."""

    def size(row: CandidateRow) -> int:
        return row.non_embedding_parameters if non_embedding else row.parameters

    return sorted(feasible, key=lambda row: (-size(row), row.candidate.id))[:LARGEST]


def best_of(rows: Sequence[CandidateRow], losses: Mapping[str, float | None]) -> CandidateRow:
    """The first of `rows` with the least loss by candidate id; one without a finite loss only if all are."""

    def loss(row: CandidateRow) -> float:
        found = losses[row.candidate.id]
        return math.inf if found is None or not math.isfinite(found) else found

    return min(rows, key=loss)
