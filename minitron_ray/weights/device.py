"""Which device computes, and in which precision."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Final, Literal

import torch
from numpy.typing import NDArray

Precision = Literal["auto", "float32", "bfloat16"]

_CONTROL_GROUPS: Final = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of the container this process is in, where it is in one."""

_SHORTAGE: Final = re.compile(
    r"DefaultCPUAllocator: can't allocate memory.*"
    r"|CUDA error: out of memory.*|\bCUBLAS_STATUS_ALLOC_FAILED\b.*"
    r"|Registering memory failed with cudaError: 2\b.*|\bCuda failure (?:2 )?'out of memory'.*"
)
"""What is said without a class of its own: by the CPU's allocator, the driver, cuBLAS, page-locking and NCCL."""


def local_device() -> torch.device:
    """The accelerator of this process where there is one, else the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def on_device(array: NDArray, device: torch.device) -> torch.Tensor:
    """`array` on `device`. To a GPU it goes through page-locked memory, of which the copy is queued; out of
    other memory it would wait for all that is queued there before."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs each operation on the calling thread: sharing out operations on a few MiB costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: `auto` is bfloat16 where the device computes it natively."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Products in `dtype` from float32 weights; nothing where `dtype` is float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on `device`, of the machine's memory or the accelerator's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds of it without a tensor in it is free, too.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = _available()
    for limit, used in _CONTROL_GROUPS:
        try:
            room = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # not on Linux, no such group, or no limit ("max")
            continue
        free = min(free, max(room, 0))
    return free


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held on `device` so far: of an accelerator those of its tensors,
    of a CPU its resident memory, in which mapped files count."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_shortage(error: BaseException) -> str | None:
    """What `error` says, in a line, where it is of memory that could not be had, on an accelerator or a CPU;
    None for any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return text or "no memory is left"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return text
    if isinstance(error, RuntimeError) and (said := _SHORTAGE.search(text)):
        return said[0]
    return None


def device_is_lost() -> bool:
    """Whether this process's accelerator fails at all that is asked of it, as it does from an illegal access or a
    failed assertion on until the process ends."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _available() -> int:
    """What the machine has for new processes, page cache that can be dropped included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
