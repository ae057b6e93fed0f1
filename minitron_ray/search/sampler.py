"""`SearchSampler`: what a file of `samplers/` provides, as one of its two kinds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from minitron_ray.core.kinds import Plugin

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class SearchSampler(Plugin):
    """Chooses the next shapes to try (`search.propose`)."""

    learns: ClassVar[bool]
    """Whether the results of trials change what it proposes."""
    uses_zero_shot: ClassVar[bool] = False
    """Whether losses of undistilled cuts change what it proposes."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is made small: `val_loss`, and a second figure where the search is for a front."""
        return ("val_loss",)


class LearningSampler(SearchSampler):
    """Asks a sampler of Optuna, which is told the results."""

    learns: ClassVar[bool] = True

    @abstractmethod
    def build(self, seed: int) -> BaseSampler:
        """The Optuna sampler."""

    @property
    @abstractmethod
    def startup_trials(self) -> int:
        """Trials whose results it needs first: till then shapes are drawn by lot."""


class OrderedSampler(SearchSampler):
    """Takes shapes in an order that no result changes."""

    learns: ClassVar[bool] = False

    @abstractmethod
    def ordered(self, feasible: Sequence[str], seed: int) -> list[str]:
        """All of `feasible`, in the order in which they are tried."""
