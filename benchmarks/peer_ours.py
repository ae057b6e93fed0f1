"""This program's loop on the job of peers.py: `online`, `cached`, or `store`, which writes what `cached` reads.

Arguments: which, the job's file and, but for `store`, two file descriptors (see turns.py). The student is
sharded as the stage `distill` shards it, over a single worker.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from turns import Turn

from minitron_ray.distillation.loop import Data, Recipe, Share, make_optimizer, train
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.sharding import Sharding
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.teacher import (
    OnlineTeacher,
    SignalBlock,
    StoredTeacher,
    TeacherSignal,
    compute_block,
    write_signal,
)
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build


def recipe_of(job: dict[str, Any]) -> Recipe:
    tokens = job["steps"] * job["batch"] * job["length"]
    return Recipe(
        loss=ForwardKL(),
        schedule=Schedule(peak=job["rate"], minimum=job["rate"], warmup=0.0, tokens=tokens),
        batch=job["batch"],
        sequence_length=job["length"],
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
    )


def data_of(job: dict[str, Any]) -> Data:
    rows, batch = np.load(job["tokens"]), job["batch"]
    return Data(batch=lambda step: np.arange((step - 1) * batch, step * batch), sequences=rows.__getitem__)


def share_of(job: dict[str, Any]) -> Share:
    return Share(
        device=torch.device(job["device"]),
        dtype=getattr(torch, job["dtype"]),
        micro_batch=job["micro_batch"],
    )


def teacher_of(job: dict[str, Any]) -> Headless:
    checkpoint = Checkpoint(Path(job["teacher"]))
    model = build(checkpoint.config, checkpoint, dtype=job["dtype"], device=job["device"])
    return Headless(model.eval())


def student_of(job: dict[str, Any], sharded: bool = True) -> Headless:
    checkpoint = Checkpoint(Path(job["student"]))
    more: dict[str, Any] = {}
    sharding = Sharding(1, torch.device(job["device"]), getattr(torch, job["dtype"])) if sharded else None
    if sharding is not None:
        more["each_layer"] = sharding.layer
    student = Headless(
        build(checkpoint.config, checkpoint, dtype="float32", device=job["device"], trainable=True, **more)
    )
    if sharding is not None:
        sharding.rest(student)
    return student


def alone(device: str) -> None:
    """A process group of this process."""
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def store(job: dict[str, Any]) -> None:
    teacher, rows = teacher_of(job), np.load(job["tokens"])
    folder = Path(job["signal"])
    folder.mkdir()
    block = SignalBlock(folder=folder, signal=FinalHidden(), sequences=range(len(rows)))
    dtype = getattr(torch, job["dtype"])
    compute_block(block, folder, teacher, rows.__getitem__, dtype=dtype, batch=job["micro_batch"], seed=0)
    write_signal(folder, [block])


def main() -> None:
    which, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    if which == "store":
        store(job)
        return
    import_module("transformers.models.llama.modeling_llama")  # not lazily, in the first step
    alone(job["device"])
    turn = Turn(*map(int, sys.argv[3:]))
    teacher: TeacherSignal
    if which == "online":
        model = teacher_of(job)
        teacher, theirs = OnlineTeacher(model), sum(each.nbytes for each in model.parameters())
    else:
        checkpoint = Checkpoint(Path(job["teacher"]))
        head = checkpoint.tensor("lm_head.weight").to(job["device"], getattr(torch, job["dtype"]))
        teacher, theirs = StoredTeacher(Path(job["signal"]), head), head.nbytes
    student, recipe = student_of(job), recipe_of(job)
    own = sum(each.nbytes for each in student.parameters())
    optimizer = make_optimizer(student, recipe)
    used = ", ".join(f"{each} {version(each)}" for each in ("minitron-ray", "transformers", "torch"))
    turn.loaded(own + theirs, versions=used)
    for step in train(student, optimizer, teacher, data_of(job), recipe, share_of(job)):
        turn.stepped(step.loss)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
