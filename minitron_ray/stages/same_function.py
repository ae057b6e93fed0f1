"""Proof that the teacher is the same function under another model type (`export.as`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from minitron_ray.core.errors import ConfigError
from minitron_ray.distillation.loop import Share
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.model import build

SEQUENCES = 2
"""Validation sequences that both are compared on."""


def prove_same_function(setting: Setting, report: Callable[..., None]) -> None:
    """In a worker. Raises ConfigError where one logit of the two models differs in one bit."""
    share = setting.share()
    ids = setting.tokens().sequences(np.asarray(setting.splits.validation[:SEQUENCES]))
    own = _logits(Checkpoint(setting.teacher_folder), ids, share)
    other = _logits(setting.teacher_checkpoint, ids, share)
    difference = float((own.float() - other.float()).abs().max())
    if not torch.equal(own, other):
        raise ConfigError(
            f"export.as: the teacher as {setting.family.model_type} gives other logits than as "
            f"{family_name(setting)} (largest difference {difference:g}); leave export.as out"
        )


def family_name(setting: Setting) -> str:
    """The model type that the teacher's own config names."""
    return str(Checkpoint(setting.teacher_folder).config["model_type"])


@torch.no_grad()
def _logits(checkpoint: Checkpoint, ids: np.ndarray, share: Share) -> torch.Tensor:
    model = build(checkpoint.config, checkpoint, dtype=share.dtype, device=share.device, trainable=False)
    logits: torch.Tensor = model(torch.from_numpy(ids).to(share.device)).logits.cpu()
    return logits
