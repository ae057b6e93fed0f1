"""What the LM head with its loss takes, forward and backward, against the plain computation.

Time is the processor time of one process's threads, in rounds that run both, in turned order. Memory is the
most that a process of its own holds beyond what it held before, less the gradients that it must return: on
a CPU resident memory, on a GPU that of tensors. Goals: at most 0.90 of the time and 0.11 of the memory of the
plain computation in float32; and at a vocabulary of 256,000 no more memory for four times the tokens.

    python benchmarks/fused_head.py
    python benchmarks/fused_head.py --device cuda --dtype bfloat16 --tokens 8192 --hidden 4096 --teacher-hidden 6144
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_ray.distillation.fused_head import fused_head_loss
from minitron_ray.distillation.losses.forward_kl import ForwardKL

LIMITS = {"time": 0.90, "memory": 0.11, "growth": 1.05}
"""What the ratios are to stay below."""
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    ratios, seconds = _times(options)
    plain, fused = (_peak(name, options.vocab, options.tokens, options) for name in ("plain", "fused"))
    small, large = (_peak("fused", options.large_vocab, count, options) for count in (512, 2048))
    found = {
        "time": statistics.median(ratios),
        "time_range": [min(ratios), max(ratios)],
        "seconds": seconds,
        "memory": fused / plain,
        "bytes": {"plain": plain, "fused": fused},
        "growth": large / small,
        "large_bytes": {"512 tokens": small, "2048 tokens": large},
    }
    _report(found, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--large-vocab", type=int, default=256_000, help="of the measurement of growth")
    parser.add_argument("--hidden", type=int, default=352)
    parser.add_argument("--teacher-hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _job(name: str, vocab: int, tokens: int, options: argparse.Namespace) -> Callable[[], None]:
    """Loss and both gradients; the tensors that go in are made here. One sequence: it predicts all but one."""
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    hidden = torch.randn(1, tokens + 1, options.hidden, device=device, requires_grad=True)
    head = (torch.randn(vocab, options.hidden, device=device) * 0.05).requires_grad_()
    teacher_hidden = torch.randn(1, tokens + 1, options.teacher_hidden, device=device).to(dtype)
    teacher_head = (torch.randn(vocab, options.teacher_hidden, device=device) * 0.05).to(dtype)
    ids = torch.randint(0, vocab, (1, tokens + 1), device=device)

    def plain() -> Tensor:
        own = (hidden[:, :-1].to(dtype) @ head.to(dtype).T).float().log_softmax(-1)
        with torch.no_grad():
            other = (teacher_hidden[:, :-1] @ teacher_head.T).float().log_softmax(-1)
        return F.kl_div(own, other, reduction="sum", log_target=True)

    def fused() -> Tensor:
        return fused_head_loss(hidden, head, ids, ForwardKL(), dtype, teacher_hidden, teacher_head)

    compute = {"plain": plain, "fused": fused}[name]

    def job() -> None:
        hidden.grad = head.grad = None
        compute().backward()

    return job


def _times(options: argparse.Namespace) -> tuple[list[float], dict[str, float]]:
    """Ratios of fused to plain, one a round, and the median seconds of both."""
    jobs = {name: _job(name, options.vocab, options.tokens, options) for name in ("plain", "fused")}
    for job in jobs.values():
        job()
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        names = list(jobs) if number % 2 else list(jobs)[::-1]
        rounds.append({name: _seconds(jobs[name], options.device) for name in names})
    seconds = {name: statistics.median(one[name] for one in rounds) for name in jobs}
    return [one["fused"] / one["plain"] for one in rounds], seconds


def _seconds(job: Callable[[], None], device: str) -> float:
    """Of the processor; of a GPU by the clock."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        started = time.perf_counter()
        job()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    job()
    return time.process_time() - started


def _peak(name: str, vocab: int, tokens: int, options: argparse.Namespace) -> int:
    """Bytes beyond inputs and returned gradients, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (name, vocab, tokens, options))


def _measured(name: str, vocab: int, tokens: int, options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    _job(name, 512, 64, options)()  # libraries take their own memory once
    job = _job(name, vocab, tokens, options)
    returned = 4 * options.hidden * (vocab + tokens + 1)
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before - returned
    with _Watch() as watch:
        job()
    return watch.most - watch.before - returned


class _Watch:
    """Resident memory of this process, looked at every millisecond by another thread."""

    def __enter__(self) -> _Watch:
        self.before = self.most = _resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.001):
            self.most = max(self.most, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def _report(found: dict[str, Any], options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    if load > 1.5:
        print(f"load average {load:.1f}: not a quiet machine", file=sys.stderr)
    mib = {name: size / 2**20 for name, size in (found["bytes"] | found["large_bytes"]).items()}
    low, high = found["time_range"]
    print(
        f"{options.tokens} tokens x {options.vocab}, {options.dtype}, {options.threads} thread(s), fused to plain"
    )
    print(f"time    {found['time']:.3f} ({low:.3f} to {high:.3f}; at most {LIMITS['time']})")
    print(
        f"memory  {found['memory']:.3f} ({mib['fused']:.0f} of {mib['plain']:.0f} MiB beyond the returned "
        f"gradients; at most {LIMITS['memory']})"
    )
    print(
        f"growth  {found['growth']:.3f} (vocabulary {options.large_vocab}: {mib['512 tokens']:.0f} MiB for 512 tokens, "
        f"{mib['2048 tokens']:.0f} MiB for 2048; at most {LIMITS['growth']})"
    )
    print(
        "\n"
        + json.dumps({"benchmark": "fused_head", "machine": platform.machine(), **vars(options), **found})
    )


if __name__ == "__main__":
    main()
