"""What a worker's process is given before each piece of work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron_ray.execution.threads import with_threads

# In a process of its own: what tests before it freed would take in the small blocks that here stand between.
FREED_BETWEEN_KEPT = """
from pathlib import Path
import torch
from minitron_ray.execution.threads import release_memory

MIB = 2**20

def anonymous():
    [line] = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024

release_memory()
before = anonymous()
for _ in range(2):  # the first freed one raises the size from which glibc maps each tensor by itself
    freed, kept = [], []
    for _ in range(60):
        freed.append(torch.ones(4 * MIB // 4))
        kept.append(torch.ones(16 * 1024))
    freed.clear()
held = anonymous() - before
release_memory()
print(held // MIB, (anonymous() - before) // MIB, len(kept))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Tensors freed between others that stay: the allocator alone would keep their pages."""
    command = [sys.executable, "-c", FREED_BETWEEN_KEPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    held, left, _ = map(int, done.stdout.split())
    assert held > 100
    assert left < 40


def test_the_function_has_its_threads() -> None:
    threads = torch.get_num_threads()
    try:
        assert with_threads(threads + 1, torch.get_num_threads) == threads + 1
    finally:
        torch.set_num_threads(threads)
