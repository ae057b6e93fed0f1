"""`probe`: how fast this machine trains, from a few of the teacher's layers. Without Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.core.units import format_bytes
from minitron_ray.distillation.fused_head import fused_head_loss
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.cost import training_flops
from minitron_ray.models.family import Family
from minitron_ray.plan import Layout, Memory, Plan
from minitron_ray.stages.hardware import Probe
from minitron_ray.weights.device import autocast, compute_dtype, free_memory, local_device
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build

SECONDS: Final = 20.0
"""That the passes may take; building the networks comes on top."""
DEPTHS: Final = (1, 3)
"""Layers of the two networks that are timed; what a layer takes is their difference."""
TIMED: Final = 3
"""Passes that are timed, behind one that warms up, where there is time for them."""
FREE_SHARE: Final = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    family: Family
    config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    sequences: int
    length: int

    def seconds(self, arch: Architecture) -> float:
        """Of one forward and backward pass of a network with random weights, the fastest of a few."""
        student, ids = self._network(arch)
        started, fastest = time.perf_counter(), float("inf")
        for number in range(1 + TIMED):
            seconds = self._pass(student, ids)
            fastest = seconds if number < 2 else min(fastest, seconds)  # the first one warms up
            if number and time.perf_counter() - started + seconds > SECONDS / 2:
                break
        return fastest

    def _network(self, arch: Architecture) -> tuple[Headless, torch.Tensor]:
        """And token ids for it."""
        random = torch.Generator().manual_seed(0)
        layers = tuple(range(arch.layers))
        config = self.family.attributes.write(self.config, arch, self.family.causal_lm, layers)
        tensors = {
            name: torch.randn(shape, generator=random) * 0.02
            for name, shape in self.family.shapes(arch).items()
        }
        model = build(config, tensors, dtype=torch.float32, device=self.device, trainable=True)
        ids = torch.randint(arch.vocab, (self.sequences, self.length), generator=random)
        return Headless(model), ids.to(self.device)

    def _pass(self, student: Headless, ids: torch.Tensor) -> float:
        started = time.perf_counter()
        use = partial(
            fused_head_loss, input_ids=ids, loss=CrossEntropy(), dtype=self.dtype, softcap=student.softcap
        )
        with autocast(self.device, self.dtype):
            loss = student(ids, use) / ids.numel()
        loss.backward()
        loss.item()  # waits for an accelerator
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def probe(plan: Plan, micro_batch: int) -> Probe:
    """Trains one and three of the teacher's layers, with embedding and LM head, for a few passes each, and
    takes the rest of its layers to be as fast as the two between.

    On a CPU as a trial does, on half of the cores, and doubled. Under half a minute. Raises
    EnvironmentFailure where the three layers do not fit the free memory.
    """
    device = local_device()
    length = plan.experiment.data.sequence_length
    dtype = compute_dtype(plan.experiment.precision, device)
    whole = plan.teacher
    small, large = (whole.with_sizes(layers=min(depth, whole.layers)) for depth in DEPTHS)
    with _half_of_the_cores(device) as parts:
        sequences, length = _affordable(plan.family, large, _rate(device, dtype), micro_batch, length)
        _check_memory(plan, large, sequences, length, device)
        bench = _Bench(
            family=plan.family,
            config=plan.config,
            device=device,
            dtype=dtype,
            sequences=sequences,
            length=length,
        )
        few, many = bench.seconds(small), bench.seconds(large)
    a_layer = max(many - few, 0.0) / max(large.layers - small.layers, 1)
    seconds = many + (whole.layers - large.layers) * a_layer
    flops = training_flops(plan.family, whole, length) * sequences * length
    return replace(_device(device), flops=parts * flops / seconds)


@contextmanager
def _half_of_the_cores(device: torch.device) -> Iterator[int]:
    """How many such halves there are; of an accelerator it is all."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or _cores() < 2:
        yield 1
        return
    torch.set_num_threads(max(1, _cores() // 2))
    try:
        yield 2
    finally:
        torch.set_num_threads(threads)


def _check_memory(plan: Plan, arch: Architecture, sequences: int, length: int, device: torch.device) -> None:
    layout = Layout(micro_batch=sequences, accelerator=device.type != "cpu")
    memory = Memory(family=plan.family, length=length, precision=plan.experiment.precision, layout=layout)
    needed, free = memory.training(arch), free_memory(device)
    if needed > FREE_SHARE * free:
        raise EnvironmentFailure(
            f"the probe would train {arch.layers} of the teacher's layers, which takes about "
            f"{format_bytes(needed)}, and {format_bytes(free)} are free; name the devices in a cluster file "
            "instead (devices: {kind: h100, count: 8})"
        )


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one square product, to begin with: large enough that on a GPU it takes longer than
    to ask for it."""
    size = 4096 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    torch.mm(matrix, matrix).sum().item()
    started = time.perf_counter()
    torch.mm(matrix, matrix).sum().item()
    return 2 * size**3 / (time.perf_counter() - started)


def _affordable(
    family: Family, arch: Architecture, rate: float, sequences: int, length: int
) -> tuple[int, int]:
    """Sequences of a pass, and their length, halved until two passes of each network may be made in time."""

    def seconds() -> float:
        flops = training_flops(family, arch, length) * sequences * length
        return 4 * flops / (0.5 * rate)  # at half of a product's speed

    while seconds() > SECONDS and (sequences > 1 or length > 128):
        if sequences > 1:
            sequences //= 2
        else:
            length //= 2
    return sequences, length


def _device(device: torch.device) -> Probe:
    """The device without its speed."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Probe(
            name=properties.name,
            count=torch.cuda.device_count(),
            flops=0.0,
            memory=properties.total_memory,
            accelerator=True,
        )
    return Probe(
        name=f"this machine ({_cores()} cores)",
        count=1,
        flops=0.0,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        accelerator=False,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
