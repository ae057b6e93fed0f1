"""A worker's process before each piece of work: its share of threads and devices, and its memory free again.

Processes are used for one piece of work after another. What the C library's allocator has of the
pieces before is free but not given back: scattered among tensors of other sizes it is of no use to the
next, and some trials of 100M parameters were seen to hold 12 GiB.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from typing import Any

import ray
import torch


def with_threads(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(*arguments)` with `threads` torch threads: with more, workers slow each other down. In a
    worker of Ray's it computes on what was reserved for it, and on the CPU where no GPU was."""
    hide_unreserved_devices()
    release_memory()
    torch.set_num_threads(threads)
    return function(*arguments)


def hide_unreserved_devices() -> None:
    """Hides the node's GPUs from a worker of Ray's that reserved none: Ray shows them all to it, where its
    `RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO` was not set when the node was started.

    To be called before anything asks CUDA for its devices, since it looks at the variable but once. That
    is enough for a process that is used again: Ray gives none that had a GPU to work without one, or the
    other way round, and sets the variable itself for work that has one.
    """
    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def release_memory() -> None:
    """Gives what earlier work of this process has freed back to the system, on CPU and GPU. Takes up to
    a second."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have no such function
    if trim is not None:
        trim(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
