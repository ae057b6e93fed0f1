"""Tree-structured Parzen estimator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from minitron_ray.search.sampler import SearchSampler

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class TPE(SearchSampler):
    """Models good and bad shapes after `startup` random ones."""

    kind: Literal["tpe"] = "tpe"
    startup: Annotated[int, Field(ge=1)] = 4

    def build(self, seed: int) -> BaseSampler:
        from optuna.samplers import TPESampler

        return TPESampler(seed=seed, n_startup_trials=self.startup)
