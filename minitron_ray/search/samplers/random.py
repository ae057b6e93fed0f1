"""Uniform choice among the feasible shapes: the control every other sampler must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from minitron_ray.search.sampler import SearchSampler

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class Random(SearchSampler):
    """Every shape is equally likely."""

    kind: Literal["random"] = "random"

    def build(self, seed: int) -> BaseSampler:
        from optuna.samplers import RandomSampler

        return RandomSampler(seed=seed)
