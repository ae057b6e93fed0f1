"""The distillation that loop_overhead.py times: our loop, and the loop that anybody would write for it.

As a program it is one process of a group that trains without Ray. Arguments: the job (JSON), rank, number of
processes, the file where they meet. It prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers import SCALES
from small_models import llama
from torch import Tensor, nn

from minitron_ray.distillation.fused_head import fused_head_loss
from minitron_ray.distillation.loop import Data, Recipe, Share, Step, make_optimizer, train
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.sharding import Sharding
from minitron_ray.distillation.teacher import OnlineTeacher
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import initialized

if TYPE_CHECKING:
    from minitron_ray.execution.train_group import Worker

RATE, DECAY, BETAS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1.0
_BATCHES = 64
"""Of different tokens; then they come again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Picklable, and JSON but for its class."""

    scale: str
    steps: int
    """Optimizer steps, with those that are not timed."""
    device: str
    dtype: str
    threads: int
    micro_batch: int

    @property
    def batch(self) -> int:
        size: int = SCALES[self.scale]["batch"]
        return size

    @property
    def length(self) -> int:
        length: int = SCALES[self.scale]["length"]
        return length

    def rows(self) -> np.ndarray:
        """Sequences, int64 (n, tokens)."""
        vocabulary = SCALES[self.scale]["vocabulary"]
        return np.random.default_rng(0).integers(1, vocabulary, (_BATCHES * self.batch, self.length))

    def model(self, name: str) -> Any:
        """The `teacher` or `student` with random weights, float32."""
        scale = SCALES[self.scale]
        shared = {"vocabulary": scale["vocabulary"], "length": max(2048, self.length)}
        config = {**llama(**scale[name], **shared), "tie_word_embeddings": False}
        model = initialized(config, seed=("teacher", "student").index(name))
        model.get_output_embeddings().weight.data.mul_(4)  # else both predict next to nothing
        return model.to(self.device)

    def teacher(self) -> Any:
        """Frozen, in the type of the products."""
        return self.model("teacher").to(getattr(torch, self.dtype)).eval().requires_grad_(False)


class Training:
    """Our loop. The student is sharded as the stage `distill` shards it: a process group must be there."""

    def __init__(self, job: Job, rank: int = 0, world: int = 1, teacher: Any = None) -> None:
        device, dtype, rows = torch.device(job.device), getattr(torch, job.dtype), job.rows()
        self._share = Share(rank=rank, world=world, device=device, dtype=dtype, micro_batch=job.micro_batch)
        model = job.model("student")
        self.student = Headless(model)
        Sharding(world, device, dtype).whole(self.student, model.base_model.layers)
        self._recipe = Recipe(
            loss=ForwardKL(),
            schedule=Schedule(peak=RATE, minimum=RATE, warmup=0.0, tokens=job.steps * job.batch * job.length),
            batch=job.batch,
            sequence_length=job.length,
            weight_decay=DECAY,
            betas=BETAS,
            clip=CLIP,
        )
        self.optimizer = make_optimizer(self.student, self._recipe)
        self._teacher = OnlineTeacher(Headless(job.teacher() if teacher is None else teacher))
        self._data = Data(
            batch=lambda step: np.arange((step - 1) * job.batch, step * job.batch),
            sequences=lambda indices: rows[indices % len(rows)],
        )

    def steps(self, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[Step]:
        return train(
            self.student,
            self.optimizer,
            self._teacher,
            self._data,
            self._recipe,
            self._share,
            stop_requested=stop_requested,
        )


def fused(model: Any, teacher: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of a micro-batch, summed: head and loss by the program's own function."""
    with torch.no_grad():
        theirs = teacher.model(input_ids=ids, use_cache=False).last_hidden_state
    own = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return fused_head_loss(own, model.lm_head.weight, ids, ForwardKL(), dtype, theirs, teacher.lm_head.weight)


def logits(model: Any, teacher: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The same from both models' logits, whole."""
    with torch.no_grad():
        theirs = teacher(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    own = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return F.kl_div(own, theirs, reduction="sum", log_target=True)


def bare(job: Job, teacher: Any, loss: Callable[[Any, Any, Tensor, torch.dtype], Tensor]) -> Iterator[float]:
    """The same training with torch and transformers alone; yields each step's loss."""
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    model, rows = job.model("student"), job.rows()
    decayed = [weight for weight in model.parameters() if weight.ndim >= 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=RATE,
        betas=BETAS,
        fused=device.type == "cuda" or None,
    )
    predictions = job.batch * (job.length - 1)
    for step in range(job.steps):
        first, total = step * job.batch % len(rows), torch.zeros((), device=device)
        for start in range(first, first + job.batch, job.micro_batch):
            end = min(start + job.micro_batch, first + job.batch)
            ids = torch.from_numpy(rows[start:end]).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                value = loss(model, teacher, ids, dtype) / predictions
            value.backward()
            total += value.detach()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield float(total)


def timed(job: Job, training: Training, after: Callable[[Step], None], **more: Any) -> dict[str, float]:
    """All steps of a training, the first not counted: wall and processor seconds, and the last loss."""
    wall = processor = loss = 0.0
    for step in training.steps(**more):
        after(step)
        loss = step.loss
        if step.step == 1:
            wall, processor = time.perf_counter(), time.process_time()
    return {
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "loss": loss,
    }


def on_worker(job: Job, worker: Worker) -> dict[str, float]:
    """Runs in a group under Ray Train; does with each step what a distillation does."""

    def tell(step: Step) -> None:
        worker.report("stage_progress", stage="distill", done=step.step, total=job.steps)

    training = Training(job, worker.rank, worker.world)
    return timed(job, training, tell, stop_requested=worker.stop_requested)


def join(job: Job, rank: int, world: int, store: dist.Store) -> None:
    if job.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if job.device == "cuda" else "gloo", store=store, rank=rank, world_size=world
    )


def main() -> None:
    job, rank, world = Job(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(job.threads)
    join(job, rank, world, dist.FileStore(sys.argv[4], world))
    found = timed(job, Training(job, rank, world), lambda step: None)
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
