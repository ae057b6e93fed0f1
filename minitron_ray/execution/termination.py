"""SIGTERM in a worker: not its end, but the wish that it comes to a safe point.

A scheduler that takes a machine back sends SIGTERM some seconds before it kills. Ray's workers would end
at once, and lose what they did since the last checkpoint.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from minitron_ray.execution.threads import hide_unreserved_devices

_TERMINATED = threading.Event()


def terminated() -> bool:
    """Whether this process was told to end."""
    return _TERMINATED.is_set()


class TerminableTorch(TorchConfig):
    """Torch's process group as usual, in workers that hear a SIGTERM instead of dying of it."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(hide_unreserved_devices)  # first: what follows asks CUDA for its devices
        super().on_start(worker_group, backend_config)
        worker_group.execute(_listen)


def _listen() -> None:
    """Called on a worker's main thread, where alone a handler can be set; the training has a thread of its own."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    _TERMINATED.set()
