"""What a worker's process is given before each piece of work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron_ray.execution.threads import release_memory, with_threads

MIB = 2**20


def anonymous() -> int:
    """Bytes of this process's own memory, as the kernel counts them."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Tensors freed between others that stay: the allocator alone would keep their pages."""
    release_memory()
    before = anonymous()
    for _ in range(2):  # the first freed one raises the size from which glibc maps each tensor by itself
        freed, kept = [], []
        for _ in range(60):
            freed.append(torch.ones(4 * MIB // 4))
            kept.append(torch.ones(16 * 1024))
        freed.clear()
    assert anonymous() - before > 100 * MIB
    release_memory()
    assert anonymous() - before < 40 * MIB
    assert len(kept) == 60


def test_the_function_has_its_threads() -> None:
    threads = torch.get_num_threads()
    try:
        assert with_threads(threads + 1, torch.get_num_threads) == threads + 1
    finally:
        torch.set_num_threads(threads)
