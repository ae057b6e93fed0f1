"""Spread a model over the workers with FSDP2: parameters, gradients and optimizer state in shards."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from minitron_ray.distillation.engine import Engine


class Sharding:
    """Shards a model in place, each decoder layer a unit of its own, the rest together: `layer` is called
    for every layer, then `rest` for the whole model. All ranks must, with the same weights.

    Weights that are on the CPU come to the device unit by unit, so that no device ever holds the whole
    model. Float32 weights stay so in their shards, where the optimizer sees them; gathered for a pass
    they are `dtype`, the one of matrix products, and the gradients are summed in float32 again.

    On a GPU a layer's parameters are dropped again after its forward pass, to make room; on a CPU,
    where gathering costs more than memory, they stay until the step is over. One rank that computes in
    float32 has nothing to share and nothing to convert: its model stays as it is.
    """

    def __init__(
        self,
        world: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        engine: Engine | None = None,
    ) -> None:
        self._engine = engine or Engine()
        self._needed = world > 1 or dtype != torch.float32
        self._drop = device.type == "cuda"
        self._policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        self._mesh = init_device_mesh(device.type, (world,)) if self._needed else None

    def layer(self, layer: nn.Module) -> None:
        prepare_layer(layer, self._engine)
        if self._needed:
            fully_shard(layer, mesh=self._mesh, reshard_after_forward=self._drop, mp_policy=self._policy)

    def whole(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        """`model`, whose decoder layers are `layers`."""
        for layer in layers:
            self.layer(layer)
        self.rest(model)

    def rest(self, model: nn.Module) -> None:
        if self._needed:
            fully_shard(model, mesh=self._mesh, reshard_after_forward=False, mp_policy=self._policy)


class FrozenSharding:
    """The same for a model that only runs forward, in the type that its weights have.

    Gathered weights are dropped after each unit's pass, on any device: nobody comes back for them. The
    head stays whole on every rank, once, because the loss needs all of it for every chunk of tokens.
    """

    def __init__(self, world: int, device: torch.device) -> None:
        self._mesh = init_device_mesh(device.type, (world,))

    def layer(self, layer: nn.Module) -> None:
        fully_shard(layer, mesh=self._mesh, reshard_after_forward=True)

    def rest(self, model: nn.Module, head: nn.Parameter) -> None:
        fully_shard(model, mesh=self._mesh, reshard_after_forward=True, ignored_params={head})


def prepare_layer(layer: nn.Module, engine: Engine) -> None:
    """Lets a decoder layer run forward as `engine` says. Before it is sharded: hooks stay outside."""
    if not (engine.recompute or engine.compiled):
        return
    layer.forward = _Forward(layer, inspect.unwrap(type(layer).forward), engine)


@cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """One for all layers of a class: they have the same sizes, and so the same code."""
    return torch.compile(forward, dynamic=False)


class _Forward:
    """A layer's forward pass. Does not hold the layer, which would then outlive its last use.

    A layer in which somebody listens is not compiled: by torch's defaults compiled code does not look whether a
    module has hooks, and all layers share the code of one that may have had none.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Any], engine: Engine) -> None:
        self._layer, self._forward, self._engine = weakref.ref(layer), forward, engine

    def __call__(self, *args: Any, **options: Any) -> Any:
        layer = self._layer()
        assert layer is not None
        compiled = self._engine.compiled and not _listened_to(layer)
        forward = _compiled(self._forward) if compiled else self._forward
        if self._engine.recompute and torch.is_grad_enabled():
            return checkpoint(forward, layer, *args, use_reentrant=False, **options)
        return forward(layer, *args, **options)


def _listened_to(layer: nn.Module) -> bool:
    """Whether a module inside has hooks; those of the layer itself are called outside of its forward pass."""
    inside = (module for module in layer.modules() if module is not layer)
    return any(module._forward_hooks or module._forward_pre_hooks for module in inside)


def begin_pass(model: nn.Module, device: torch.device, *, last: bool) -> None:
    """Before each forward pass of a step; `last` is the step's last one. Nothing for a model in one piece.

    On a CPU gathered weights and whole gradients stay until the last pass. On a GPU gradients are
    summed after every pass, beside the backward computation: whole ones would not fit.
    """
    if not isinstance(model, FSDPModule) or device.type == "cuda":
        return
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)
