"""Tree-structured Parzen estimator."""

from __future__ import annotations

import warnings
from math import ceil
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from minitron_ray.search.sampler import LearningSampler

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class TPE(LearningSampler):
    """Models good and bad shapes, all sizes jointly, from the first results on.

    The best quarter counts as good, not Optuna's tenth, which of a dozen trials is one or two.
    """

    uses_zero_shot: ClassVar[bool] = True

    kind: Literal["tpe"] = "tpe"
    startup: Annotated[int, Field(ge=1)] = 4
    """Trials before: half of them the best undistilled cuts, where those are scored, the others by lot."""

    @property
    def startup_trials(self) -> int:
        return self.startup

    def build(self, seed: int) -> BaseSampler:
        from optuna.samplers import TPESampler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `gamma` goes with Optuna 6; we hold to 5
            return TPESampler(seed=seed, n_startup_trials=1, multivariate=True, gamma=_quarter)


def _quarter(trials: int) -> int:
    return ceil(trials / 4)
