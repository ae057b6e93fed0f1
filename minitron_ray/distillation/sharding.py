"""Spread a student over the workers with FSDP2: parameters, gradients and optimizer state in shards."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def shard(model: nn.Module, layers: nn.ModuleList, world: int, device: torch.device) -> None:
    """Shards `model` in place, each decoder layer a unit of its own, the rest together.

    On a GPU a layer's parameters are dropped again after its forward pass, to make room; on a CPU,
    where gathering costs more than memory, they stay until the backward pass is over.
    """
    mesh = init_device_mesh(device.type, (world,))
    drop = device.type == "cuda"
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=drop)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
