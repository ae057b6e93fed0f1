"""Groups of real worker processes for tests, as `torch.distributed` sees them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, Final

import torch

_IMPORTED: Final = (
    "minitron_ray.stages.distill_job",
    "minitron_ray.execution.train_group",
    "transformers.models.llama.modeling_llama",
)


def begin_group(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """`function(rank, world, *arguments)` in so many processes, to their end. Raises what torch's `spawn` does.

    They are forked from a process that has imported once what they need, and has no threads yet."""
    multiprocessing.set_forkserver_preload(list(_IMPORTED))
    torch.multiprocessing.start_processes(
        function, args=(world, *arguments), nprocs=world, start_method="forkserver"
    )
