"""A worker's process before each piece of work: its share of the CPU threads, and its memory free again.

Processes are used for one piece of work after another. What the C library's allocator has of the
pieces before is free but not given back: scattered among tensors of other sizes it is of no use to the
next, and some trials of 100M parameters were seen to hold 12 GiB.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import torch


def with_threads(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(*arguments)` with `threads` torch threads: with more, workers slow each other down."""
    release_memory()
    torch.set_num_threads(threads)
    return function(*arguments)


def release_memory() -> None:
    """Gives what earlier work of this process has freed back to the system, on CPU and GPU. Takes up to
    a second."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have no such function
    if trim is not None:
        trim(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
