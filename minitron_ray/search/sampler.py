"""`SearchSampler`: what a file of `samplers/` provides."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from minitron_ray.core.kinds import Plugin

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class SearchSampler(Plugin):
    """Chooses the next shape to try."""

    @abstractmethod
    def build(self, seed: int) -> BaseSampler:
        """The Optuna sampler."""
