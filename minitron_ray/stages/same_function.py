"""Proof that the teacher, and the model that is cut, are the same functions under another model type
(`export.as`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from minitron_ray.core.errors import ConfigError
from minitron_ray.distillation.loop import Share
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.layerwise import StreamedLayerwise
from minitron_ray.weights.vocabulary import chunk_logits, chunks

SEQUENCES = 2
"""Validation sequences that a model is compared on with itself."""


def prove_same_function(setting: Setting, report: Callable[..., None]) -> None:
    """In a worker. Raises ConfigError where one logit differs in one bit between a model and the same model
    as the other type."""
    _prove("the teacher", Checkpoint(setting.teacher_folder), setting.teacher_checkpoint, setting)
    if setting.start_folder is not None:
        _prove("the model to cut", Checkpoint(setting.start_folder), setting.checkpoint, setting)


def _prove(whose: str, written: Checkpoint, taken: Checkpoint, setting: Setting) -> None:
    types = [str(checkpoint.config["model_type"]) for checkpoint in (taken, written)]
    if types[0] == types[1]:
        return
    share = setting.share()
    ids = setting.tokens().sequences(np.asarray(setting.splits.validation[:SEQUENCES]))
    own, other = _logits(written, ids, share), _logits(taken, ids, share)
    if not torch.equal(own, other):
        difference = float((own - other).abs().max())
        raise ConfigError(
            f"export.as: {whose} as {types[0]} gives other logits than as {types[1]} (largest difference "
            f"{difference:g}); leave export.as out"
        )


def _logits(checkpoint: Checkpoint, ids: np.ndarray, share: Share) -> torch.Tensor:
    """Layer by layer: whether two files agree is no reason to hold a model that is spread over devices whole."""
    network = StreamedLayerwise(checkpoint, dtype=share.dtype, device=share.device)
    state = network.start(torch.from_numpy(ids).to(share.device))
    hidden = state.hidden
    for layer in range(network.layers):
        hidden = network.apply(layer, hidden, state)
    states, head = network.finish(hidden).flatten(0, 1), network.head
    parts = chunks(len(states), len(head), share.device)
    return torch.cat([chunk_logits(states[part], head, network.softcap).cpu() for part in parts])
