"""A group's work for tests: counts together, one step after the other, and saves how far it is."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minitron_ray.execution.train_group import Again, Worker


@dataclass(frozen=True, kw_only=True)
class Counting:
    """`folder` holds the step that is `saved`, and a line of `log` for every step: step, workers, processes."""

    folder: Path
    steps: int
    every: int = 5
    pause: float = 0.1
    fails: bool = False
    least: int = 1
    """With fewer workers it goes on behind `steps`, for two minutes."""

    def saved(self) -> int:
        file = self.folder / "saved"
        return int(file.read_text()) if file.exists() else 0

    def save(self, step: int) -> None:
        (self.folder / "saving").write_text(str(step))
        (self.folder / "saving").replace(self.folder / "saved")

    def log(self) -> list[dict[str, Any]]:
        file = self.folder / "log"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def count(job: Counting, worker: Worker) -> dict[str, int] | Again:
    """The last step, and by how many workers it was made."""
    step = job.saved()
    last = job.steps
    if job.least > 1:
        last = max(last, step + 1) if worker.world >= job.least else round(120 / job.pause)
    while step < last:
        time.sleep(job.pause)
        if job.fails and step == 1:
            raise RuntimeError("sizes 3 and 4 do not match")
        processes = torch.zeros(worker.world, dtype=torch.int64)
        processes[worker.rank] = os.getpid()
        wishes = torch.tensor([int(worker.stop_requested()), int(worker.regroup_requested())])
        dist.all_reduce(processes)
        dist.all_reduce(wishes)
        stop, regroup = wishes.bool().tolist()
        step += 1
        if worker.rank == 0:
            line = {"step": step, "workers": worker.world, "processes": processes.tolist()}
            with (job.folder / "log").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            if step % job.every == 0 or stop or step == last:
                job.save(step)
        if step < last and (stop or (regroup and step % job.every == 0)):
            return {"step": step, "workers": 0} if worker.stopped_by_user() else Again(f"left at step {step}")
    return {"step": step, "workers": worker.world}
