"""`build`: a stock transformers model around given weights, checked against the family's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import TIED_HEAD, Checkpoint, torch_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def build(
    config: Mapping[str, Any],
    tensors: Checkpoint | Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    trainable: bool = False,
) -> PreTrainedModel:
    """The network that `config` describes, with `tensors` as its weights.

    No memory is taken for weights that already have the type and the device: those of a checkpoint
    stay memory-mapped, those of a mapping are shared with it. Training writes to them; a checkpoint's
    file never changes. A trainable model is in training mode, any other in evaluation mode without
    gradients. The key-value cache is off. Code comes from transformers alone, and no network is used.

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
    weights = {name: take(name).to(device=place, dtype=kind) for name in family.shapes(arch)}
    _assign(model, weights, tied=arch.tied)
    model.to(place)  # buffers
    planned, built = family.parameters(arch), sum(parameter.numel() for parameter in model.parameters())
    if built != planned:
        raise RuntimeError(f"the built model has {built:,} parameters, planned were {planned:,}")
    model.requires_grad_(trainable)
    return model.train(trainable)


def skeleton(config: Mapping[str, Any]) -> PreTrainedModel:
    """The network without weights: parameters on the meta device, in float32."""
    return _skeleton(family_of(config).canonical(config), torch_dtype("float32"))


def _skeleton(config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Parameters on the meta device; buffers, which are not in a checkpoint, are real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    attributes = {name: value for name, value in config.items() if name not in ("model_type", "torch_dtype")}
    stock = AutoConfig.for_model(config["model_type"], **attributes)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(stock, attn_implementation="sdpa", dtype=dtype)
    model.tie_weights()
    model.config.use_cache = False
    return model


def _assign(model: PreTrainedModel, weights: dict[str, torch.Tensor], tied: bool) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if tied:
        model.tie_weights()
        missing = [name for name in missing if name != TIED_HEAD]
    if missing or unexpected:
        raise RuntimeError(f"the table and the model disagree: missing {missing}, unexpected {unexpected}")
