"""Give a function the CPU threads its task reserved: with more, workers slow each other down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def with_threads(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(*arguments)` with `threads` torch threads."""
    torch.set_num_threads(threads)
    return function(*arguments)
