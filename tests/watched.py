"""Weights whose memory is followed while a model is built from them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping

import torch

from minitron_ray.models.family import Row


class Watched(Mapping[str, torch.Tensor]):
    """Weights whose memory is followed: names of those that are alive, and the layers seen so at once."""

    def __init__(self, given: Mapping[str, torch.Tensor], rows: Iterable[Row]) -> None:
        self._given, self._layers = given, {row.name: row.layer for row in rows}
        self.alive: set[str] = set()
        self.most = 0

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __getitem__(self, name: str) -> torch.Tensor:
        # A tensor's memory outlives the tensor, in a parameter; an array lives as long as either.
        memory = self._given[name].numpy()
        weakref.finalize(memory, self.alive.discard, name)
        self.alive.add(name)
        self.most = max(self.most, len({self._layers[one] for one in self.alive} - {None}))
        return torch.from_numpy(memory)
