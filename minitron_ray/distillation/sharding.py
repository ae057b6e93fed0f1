"""Spread a student over the workers with FSDP2: parameters, gradients and optimizer state in shards."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Sharding:
    """Shards a model in place, each decoder layer a unit of its own, the rest together: `layer` is called
    for every layer, then `rest` for the whole model. All ranks must, with the same weights.

    Weights that are on the CPU come to the device unit by unit, so that no device ever holds the whole
    model. On a GPU a layer's parameters are dropped again after its forward pass, to make room; on a
    CPU, where gathering costs more than memory, they stay until the backward pass is over.
    """

    def __init__(self, world: int, device: torch.device) -> None:
        self._mesh = init_device_mesh(device.type, (world,))
        self._drop = device.type == "cuda"

    def layer(self, layer: nn.Module) -> None:
        fully_shard(layer, mesh=self._mesh, reshard_after_forward=self._drop)

    def whole(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        """`model`, whose decoder layers are `layers`."""
        for layer in layers:
            self.layer(layer)
        self.rest(model)

    def rest(self, model: nn.Module) -> None:
        fully_shard(model, mesh=self._mesh, reshard_after_forward=False)
