"""`build`: a stock transformers model around given weights, checked against the family's table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from minitron_ray.models.architecture import Architecture
from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family, Row
from minitron_ray.weights.checkpoint import Checkpoint, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

DROPOUT: Final = ("dropout", "_pdrop")
"""Endings of the attributes of a config that are rates of dropout."""


def build(
    config: Mapping[str, Any],
    tensors: Checkpoint | Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    trainable: bool = False,
    each_layer: Callable[[nn.Module], None] = lambda layer: None,
) -> PreTrainedModel:
    """The network that `config` describes, with `tensors` as its weights.

    No memory is taken for weights that already have the type and the device: those of a checkpoint
    stay memory-mapped, those of a mapping are shared with it. Training writes to them; a checkpoint's
    file never changes. A trainable model is in training mode, any other in evaluation mode without
    gradients. The key-value cache and all dropout are off. Code comes from transformers alone, and no
    network is used.

    `each_layer` is called with every decoder layer once its weights are there, before those of the next
    are read: it may spread them over several devices, none of which then holds all layers.

    Raises ConfigError for a config or checkpoint that is not the family's, RuntimeError where the
    built model's parameter count is not the planned one.
    """
    import torch

    family = family_of(config)
    arch = family.read(config)
    if isinstance(tensors, Checkpoint):
        tensors.check(family, arch)
    take: Callable[[str], torch.Tensor] = (
        tensors.tensor if isinstance(tensors, Checkpoint) else tensors.__getitem__
    )
    kind, place = torch_dtype(dtype), torch.device(device)
    model = _skeleton(family.canonical(config), kind)
    model.requires_grad_(trainable)  # weights that are assigned take it over
    _move_buffers(model, place)

    by_layer: dict[int | None, list[Row]] = defaultdict(list)
    for row in family.rows(arch):
        by_layer[row.layer].append(row)

    def weights(layer: int | None) -> dict[str, torch.Tensor]:
        rows = ((row, take(row.name).to(device=place, dtype=kind)) for row in by_layer[layer])
        return stacked(rows, family, arch)

    later = (f"{family.decoder_layers}.", *([f"{family.lm_head}.weight"] if arch.tied else []))
    _assign(model, weights(None), but=later)  # in no variable: of what is spread out nothing whole may stay
    if arch.tied:
        model.tie_weights()
    for number in range(arch.layers):
        path = f"{family.decoder_layers}.{number}"
        _assign(model, weights(number), f"{path}.")
        each_layer(model.get_submodule(path))
    _check_count(model, family.parameters(arch))
    return model.train(trainable)


def initialized(
    config: Mapping[str, Any], *, seed: int, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The trainable network that `config` describes with random weights, float32, as transformers starts one.

    The weights depend on `seed` alone, and on no device. All dropout is off. Raises RuntimeError as `build`
    does.
    """
    import torch

    family, place = family_of(config), torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _stock(family.canonical(config), torch.float32, nullcontext())
    _check_count(model, family.parameters(family.read(config)))
    model.to(place)
    model.requires_grad_(True)
    return model.train()


def skeleton(config: Mapping[str, Any], dtype: torch.dtype | str = "float32") -> PreTrainedModel:
    """The network without weights: parameters on the meta device, in `dtype`."""
    return _skeleton(family_of(config).canonical(config), torch_dtype(dtype))


def _skeleton(config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Parameters on the meta device; buffers, which are not in a checkpoint, are real."""
    from accelerate import init_empty_weights

    return _stock(config, dtype, init_empty_weights(include_buffers=False))


def _stock(
    config: dict[str, Any], dtype: torch.dtype, during: AbstractContextManager[Any]
) -> PreTrainedModel:
    """The network of transformers, made within the context `during`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from minitron_ray.weights import experts

    attributes = {name: value for name, value in config.items() if name not in ("model_type", "torch_dtype")}
    stock = AutoConfig.for_model(config["model_type"], **attributes)
    for name in stock.to_dict():  # those, too, of which `config` is silent: GPT-2's are on by default
        if name.endswith(DROPOUT):
            # What a student drops is lost on it: it is to agree with a teacher that drops nothing.
            # Training then draws no random numbers either, so none belong to what it goes on from.
            setattr(stock, name, 0.0)
    family, choices = family_of(config), {}
    if family.stacks:
        experts.register()
        choices["experts_implementation"] = experts.IMPLEMENTATION
    with during:
        model = AutoModelForCausalLM.from_config(
            stock, attn_implementation=family.attention, dtype=dtype, **choices
        )
    model.tie_weights()
    model.config.use_cache = False
    return model


def _check_count(model: PreTrainedModel, planned: int) -> None:
    built = sum(parameter.numel() for parameter in model.parameters())
    if built != planned:
        raise RuntimeError(f"the built model has {built:,} parameters, planned were {planned:,}")


def stacked(
    rows: Iterable[tuple[Row, torch.Tensor]], family: Family, arch: Architecture
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as the stock model's parameters: those of experts joined and stacked.

    Others are passed on as they are. The rows of one layer may be given without those of the others.
    """
    import torch

    homes = {part: (name, place) for name, parts in family.stacks.items() for place, part in enumerate(parts)}
    parameters: dict[str, torch.Tensor] = {}
    for row, tensor in rows:
        if row.expert is None:
            parameters[row.name] = tensor
            continue
        pattern, place = homes[row.tensor.name]
        name, parts = pattern.format(layer=row.layer), family.stacks[pattern]
        if name not in parameters:
            shape = (arch.experts, len(parts) * tensor.shape[0], *tensor.shape[1:])
            parameters[name] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        start = place * tensor.shape[0]
        parameters[name][row.expert, start : start + tensor.shape[0]] = tensor
    return parameters


def unstacked(
    parameters: Iterable[tuple[str, torch.Tensor]], family: Family
) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse of `stacked`, by name: the stock model's parameters as a checkpoint's tensors."""
    patterns = {re.compile(re.escape(name).replace(r"\{layer\}", r"(\d+)")): name for name in family.stacks}
    for name, tensor in parameters:
        found = next(((m, patterns[p]) for p in patterns if (m := p.fullmatch(name))), None)
        if found is None:
            yield name, tensor
            continue
        match, pattern = found
        for expert, joined in enumerate(tensor):
            parts = family.stacks[pattern]
            for part, value in zip(parts, joined.chunk(len(parts)), strict=True):
                yield part.format(layer=match[1], expert=expert), value


def _assign(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], under: str = "", but: tuple[str, ...] = ()
) -> None:
    """Makes `weights` the parameters of the module whose names begin with `under`. Raises RuntimeError
    unless they are all of them, those whose names begin with one of `but` aside."""
    own = {name.removeprefix(under): tensor for name, tensor in weights.items()}
    module = model.get_submodule(under.removesuffix("."))
    found = module.load_state_dict(own, strict=False, assign=True)
    missing = [under + name for name in found.missing_keys if not name.startswith(but)]
    unexpected = [under + name for name in found.unexpected_keys]
    if missing or unexpected:
        raise RuntimeError(f"the table and the model disagree: missing {missing}, unexpected {unexpected}")


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Those alone: `to` would fail on parameters without weights."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
