"""`Engine`: how a training is carried out, as far as no result depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

TEACHER_SHARE: Final = 0.1
"""Of a device's free memory: a teacher that would take more is spread over the workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Memory against time. None of it enters a fingerprint."""

    recompute: bool = False
    """Whether a layer keeps only its input for the backward pass, and runs forward again there."""
    compiled: bool = False
    """Whether layers go through torch.compile."""
    teacher: Literal["auto", "whole", "sharded"] = "auto"
    """Whether each of several workers holds the whole running teacher, or a shard of it."""
    peak: float | None = None
    """Operations a second of one device at its peak, in the type of the products; None where it is not known."""
