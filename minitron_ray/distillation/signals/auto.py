"""The signal is chosen by rule (`plan/signal.py`)."""

from __future__ import annotations

from typing import Literal

from minitron_ray.distillation.signal import Signal


class Auto(Signal):
    """The most exact kind that fits on disk and that the loss takes; `plan` says which and why."""

    kind: Literal["auto"] = "auto"
