"""Ranks wait for one that writes a model for longer than the training group's patience."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minitron_ray.distillation.checkpoints import Checkpoints
from tests.processes import begin_group

PATIENCE_S, WRITES_S = 2, 5


def _rank(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    checkpoints = Checkpoints(folder / "checkpoints", rank, torch.device("cpu"))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=PATIENCE_S))
    if rank == 0:
        time.sleep(WRITES_S)
        (folder / "written").touch()
    checkpoints.wait()
    assert (folder / "written").exists()
    if rank == 0:
        time.sleep(WRITES_S)
    else:  # as long again, on the group that trains
        with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
            dist.barrier()
    (folder / f"done-{rank}").touch()


@pytest.mark.slow
def test_the_others_wait_for_longer_than_training_would(tmp_path: Path) -> None:
    begin_group(_rank, 2, tmp_path)
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists()
