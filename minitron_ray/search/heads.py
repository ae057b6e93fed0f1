"""Which heads and KV groups of a layer stay, and what the heads that go leave behind (paper §2.1, §2.2).

A query head stays with the keys and values it was trained with, so heads are ranked inside *pools*
that share them, equally many kept of each. A pool is

- a KV group, also where some groups are dropped;
- the groups that are averaged into one, under `kv_groups: mean`;
- the whole layer, where each of the teacher's heads has its own keys and values and goes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitron_ray.models.architecture import Architecture
from minitron_ray.models.kept import Blend, Groups, Indices

if TYPE_CHECKING:
    from minitron_ray.search.selection import CutRules, MergeRule
    from minitron_ray.search.shape import Candidate


class HeadChoice(NamedTuple):
    """What `models.kept.Kept` holds for one layer, with the same meaning of empty tuples."""

    heads: Indices
    groups: Groups
    blends: tuple[Blend, ...]


def problem(shape: Candidate, teacher: Architecture, rules: CutRules) -> str | None:
    """Why the rules cannot cut so many heads and KV groups out of the teacher's; None where they can."""
    heads, groups = shape.heads, shape.kv_heads
    if groups < 1 or heads % groups:
        return f"{heads} heads do not divide into {groups} KV groups"
    averaged = _averages(shape, teacher, rules)
    if averaged and teacher.kv_heads % groups:
        return (
            f"kv_heads {groups} does not divide the teacher's {teacher.kv_heads}, of which neighbours are "
            f"averaged (kv_groups: mean)"
        )
    pool, kept = _pool_size(shape, teacher, rules), _kept_of_pool(shape, teacher)
    if kept > pool:
        told = "; kv_groups: mean averages groups instead" if rules.kv_groups == "drop" else ""
        return f"{heads} heads in {groups} KV groups are {kept} a group, the teacher has {pool}{told}"
    if rules.merge_heads == "none" or pool == kept:
        return None
    if averaged and teacher.heads_per_group == 1:
        return (
            f"merge_heads: {rules.merge_heads} would merge keys and values that kv_groups: mean averages; "
            f"use one of the two"
        )
    if pool - kept > kept:
        return (
            f"merge_heads: {rules.merge_heads} pairs each head that goes with one that stays, so at most half "
            f"of {pool} can go, not {pool - kept}"
        )
    return None


def choose(
    scores: NDArray, group_scores: NDArray | None, shape: Candidate, teacher: Architecture, rules: CutRules
) -> HeadChoice:
    """The heads of one layer.

    `scores` (heads,) and, where KV groups were scored themselves, `group_scores` (kv_heads,); without
    them a group's score is the L2 norm of its heads' scores, as heads themselves pool their channels.
    Expects a shape without a `problem`.
    """
    groups = _groups(scores, group_scores, shape, teacher, rules)
    pools = _pools(groups, shape, teacher)
    share = _kept_of_pool(shape, teacher)
    heads: list[int] = []
    blends: dict[int, Blend] = {}
    for pool in pools:
        ranked = ranking(scores[pool])
        order = [pool[position] for position in ranked]
        heads += order[:share]
        blends |= merged(order, share, rules.merge_heads)
    kept = tuple(sorted(heads))
    merging = rules.merge_heads != "none" and share < len(pools[0])
    return HeadChoice(
        heads=kept,
        groups=groups if len(groups) < teacher.kv_heads and not _follows(shape, teacher) else (),
        blends=tuple(blends[head] for head in kept) if merging else (),
    )


def ranking(scores: NDArray) -> list[int]:
    """Indices from the largest score to the smallest; among equals, the first goes first."""
    ranked: list[int] = np.argsort(-scores, kind="stable").tolist()
    return ranked


def merged(order: Sequence[int], kept: int, rule: MergeRule) -> dict[int, Blend]:
    """What each kept head of a pool becomes, by head: `order` is the pool from best to worst.

    In rank order (from 1) the kept head i is paired with the dropped head j = 2 * kept - i + 1: the
    weakest kept with the strongest dropped (paper §2.1). A kept head without a partner stays itself;
    the others become, in the matrices that make them,

    - `paper`: head_i + (head_i - head_j) = 2 head_i - head_j, as printed;
    - `laco`: head_i + (head_j - head_i) = head_j, LaCo's sum with its one term: the dropped head's
      queries (and keys and values, where heads have their own) behind the kept head's output columns;
    - `mean`: (head_i + head_j) / 2.
    """
    blends: dict[int, Blend] = {}
    for rank, head in enumerate(order[:kept], start=1):
        partner = 2 * kept - rank + 1
        if rule == "none" or partner > len(order):
            blends[head] = ((head, 1.0),)
            continue
        other = order[partner - 1]
        blends[head] = {
            "paper": ((head, 2.0), (other, -1.0)),
            "laco": ((other, 1.0),),
            "mean": ((head, 0.5), (other, 0.5)),
        }[rule]
    return blends


def _follows(shape: Candidate, teacher: Architecture) -> bool:
    """Whether each head takes its own keys and values along."""
    return teacher.heads_per_group == 1 and shape.heads == shape.kv_heads


def _averages(shape: Candidate, teacher: Architecture, rules: CutRules) -> bool:
    fewer = shape.kv_heads < teacher.kv_heads
    return rules.kv_groups == "mean" and fewer and not _follows(shape, teacher)


def _pool_size(shape: Candidate, teacher: Architecture, rules: CutRules) -> int:
    if _follows(shape, teacher):
        return teacher.heads
    if _averages(shape, teacher, rules):
        return teacher.heads // shape.kv_heads
    return teacher.heads_per_group


def _kept_of_pool(shape: Candidate, teacher: Architecture) -> int:
    return shape.heads if _follows(shape, teacher) else shape.heads // shape.kv_heads


def _groups(
    scores: NDArray, group_scores: NDArray | None, shape: Candidate, teacher: Architecture, rules: CutRules
) -> Groups:
    """The student's KV heads, each as the teacher's it is the mean of."""
    if _follows(shape, teacher) or shape.kv_heads == teacher.kv_heads:
        return tuple((group,) for group in range(teacher.kv_heads))
    if rules.kv_groups == "mean":
        size = teacher.kv_heads // shape.kv_heads
        return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(shape.kv_heads))
    if group_scores is None:
        group_scores = np.sqrt(np.square(scores.reshape(teacher.kv_heads, -1)).sum(axis=1))
    return tuple((group,) for group in sorted(ranking(group_scores)[: shape.kv_heads]))


def _pools(groups: Groups, shape: Candidate, teacher: Architecture) -> list[list[int]]:
    """The teacher's heads that are ranked against each other; head h belongs to group h // heads_per_group."""
    if _follows(shape, teacher):
        return [list(range(teacher.heads))]
    size = teacher.heads_per_group
    return [[g * size + head for g in group for head in range(size)] for group in groups]
