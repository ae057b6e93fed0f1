"""No signal is kept: the teacher runs beside every student."""

from __future__ import annotations

from typing import Literal

from minitron_ray.distillation.signal import Signal


class Online(Signal):
    """Takes no disk, and the teacher's memory and forward pass in every trial."""

    kind: Literal["online"] = "online"
