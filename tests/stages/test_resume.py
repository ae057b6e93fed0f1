"""A distillation that is cut off and goes on is the same distillation: real worker processes under gloo."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.data.splits import Splits
from minitron_ray.execution.settings import CheckpointSettings
from minitron_ray.execution.train_group import Again, Worker
from minitron_ray.experiment import Experiment
from minitron_ray.importance.scores import Scores
from minitron_ray.results.store import Store
from minitron_ray.search.space import Candidate
from minitron_ray.stages.distill_job import DistillJob, distill_worker
from minitron_ray.stages.setting import Setting
from minitron_ray.weights.checkpoint import Checkpoint
from tests.processes import begin_group
from tests.settings import setting_of

STEPS, EVERY, BATCH, LENGTH = 14, 4, 4, 32
CANDIDATE = Candidate(layers=3, hidden=36, heads=3, kv_heads=3, mlp=64)


@pytest.fixture(scope="module")
def setting(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("setting")
    model = folder / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    # Random numbers of dropout would be others after a resume, and on another number of workers.
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    experiment = Experiment.model_validate(
        {
            "name": "x",
            "precision": "float32",
            "teacher": {"path": str(model)},
            "data": {"source": {"kind": "files", "path": f"{tiny_text}/**/*.txt"}, "sequence_length": LENGTH},
            "budget": {"parameters": "50k..90k"},
            "search": {"space": {"hidden": [36, 42]}},
            "distill": {
                "tokens": STEPS * BATCH * LENGTH,
                "batch": BATCH,
                "learning_rate": 3e-3,
                "checkpoint_every": EVERY * BATCH * LENGTH,
                "validate_every": 3 * BATCH * LENGTH,
            },
        }
    )
    splits = Splits(calibration=range(4), validation=range(4, 8), train=range(8, 80))
    return setting_of(experiment, model, folder, splits)


def job(setting: Setting, folder: Path, **checkpoints: Any) -> DistillJob:
    draw = np.random.default_rng(0).random
    scores = Scores(
        hidden=draw(48), heads=draw((4, 6)), kv_heads=draw((4, 3)), mlp=draw((4, 96)), layers=draw(4)
    )
    return DistillJob(
        setting=setting,
        scores=scores,
        candidate=CANDIDATE,
        folder=folder,
        store=Store(folder, "x", "1"),
        checkpoints=CheckpointSettings(**checkpoints),
    )


class Told:
    """What happens at a step: nothing, a kill, a wish to stop, one for more workers."""

    def __init__(self, at: int, what: str) -> None:
        self.at, self.what, self.step = at, what, 0

    def report(self, kind: str, **fields: Any) -> None:
        self.step = fields["step"]
        if self.what == "kill" and self.step == self.at:
            os._exit(9)

    def stop(self) -> bool:  # asked before the step is reported
        return self.what == "stop" and self.step + 1 >= self.at

    def regroup(self) -> bool:
        return self.what == "regroup" and self.step >= self.at


def _rank(rank: int, world: int, job: DistillJob, at: int, what: str, limit: int, out: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(out / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    told = Told(at, what)
    worker = Worker(
        rank=rank,
        world=world,
        device=torch.device("cpu"),
        report=told.report if rank == 0 else lambda kind, **fields: None,
        stop_requested=told.stop if rank == 0 else lambda: False,
        regroup_requested=told.regroup if rank == 0 else lambda: False,
    )
    try:
        ended = distill_worker(job, worker)
    except EnvironmentFailure as error:
        ended = {"error": error.message}
    if rank == 0:
        (out / "ended.json").write_text(
            json.dumps(ended if isinstance(ended, dict) else {"again": ended.reason})
        )
    torch.distributed.destroy_process_group()


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[..., Any]:
    """One group of workers on a job, and what its rank 0 returned; None where it was killed."""
    count = iter(range(100))

    def begin(job: DistillJob, world: int = 1, *, at: int = 0, what: str = "", limit: int = 0) -> Any:
        out = tmp_path / f"attempt-{next(count)}"
        out.mkdir()
        try:
            begin_group(_rank, world, job, at, what, limit, out)
        except ProcessExitedException as error:
            assert what == "kill" and error.exit_code == 9
            return None
        ended = json.loads((out / "ended.json").read_text())
        return Again(ended["again"]) if "again" in ended else ended

    return begin


def curve(job: DistillJob) -> list[tuple[Any, ...]]:
    """What the table says of each step; a step that is there twice, or not, shows in the first column."""
    rows = sorted(job.store.read("steps").to_pylist(), key=lambda row: row["step"])
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"], row["gradient_norm"], row["val_loss"]) for row in rows]


def weights(job: DistillJob) -> dict[str, torch.Tensor]:
    final = Checkpoint(job.folder / "final")
    return {name: final.tensor(name) for name in final.names()}


@pytest.fixture(scope="module")
def whole(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> DistillJob:
    """By one worker, never cut off, and with its checkpoints written before it goes on."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "out").mkdir()
    one = job(setting, folder, asynchronous=False)
    begin_group(_rank, 1, one, 0, "", 0, folder / "out")
    assert len(curve(one)) == STEPS
    return one


def test_killed_stopped_and_regrouped_it_is_bit_for_bit_the_same(
    setting: Setting, whole: DistillJob, attempt: Callable[..., Any], tmp_path: Path
) -> None:
    cut = job(setting, tmp_path / "cut")
    assert attempt(cut, at=3, what="kill") is None, "before the first checkpoint"
    assert cut.saved() == 0
    stopped = attempt(cut, at=3, what="stop")
    assert stopped == Again("a worker was told to end: stopped at step 3") and len(curve(cut)) == 3
    grown = attempt(cut, at=4, what="regroup")
    assert isinstance(grown, Again) and "room for more" in grown.reason and len(curve(cut)) == 4
    assert attempt(cut, at=9, what="kill") is None, "while that of step 8 may still be written"
    assert cut.saved() in (4, 8)
    assert attempt(cut) == {"step": STEPS, "tokens": STEPS * BATCH * LENGTH, "interrupted": False}
    assert curve(cut) == curve(whole)
    ours, theirs = weights(cut), weights(whole)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_at_another_number_of_workers_it_differs_by_rounding_only(
    setting: Setting, attempt: Callable[..., Any], tmp_path: Path
) -> None:
    alone, both = job(setting, tmp_path / "alone"), job(setting, tmp_path / "both", keep=1)
    attempt(alone)
    attempt(both, world=2, at=6, what="stop")
    assert len(list((both.folder / "checkpoints").glob("step-*"))) == 1
    attempt(both, world=1, at=10, what="stop")
    attempt(both, world=2)
    for ours, theirs in zip(curve(both), curve(alone), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    setting: Setting, whole: DistillJob, attempt: Callable[..., Any], tmp_path: Path
) -> None:
    cut = job(setting, tmp_path / "cut")
    attempt(cut, at=10, what="stop")
    checkpoints = cut.folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000008", "step-00000010"]
    part = next((checkpoints / "step-00000010").glob("*.distcp"))
    assert cut.saved() == 10
    part.write_bytes(part.read_bytes()[:-100])
    assert cut.saved() == 8, "what the next group has in hand"
    error = attempt(cut, limit=part.stat().st_size // 4)["error"]
    assert "the checkpoint of step 12 can't be written" in error and "it goes on from step 8" in error
    assert cut.saved() == 8
    attempt(cut)
    assert curve(cut) == curve(whole)


def test_a_damaged_checkpoint_does_not_outlive_sound_ones(
    setting: Setting, attempt: Callable[..., Any], tmp_path: Path
) -> None:
    """It is later than those that are made again, but none of the newest to keep."""
    cut = job(setting, tmp_path / "cut", keep=1)
    attempt(cut, at=10, what="stop")
    [later] = (cut.folder / "checkpoints").glob("step-*")
    (later / ".metadata").unlink()
    attempt(cut, at=6, what="stop")
    assert [path.name for path in (cut.folder / "checkpoints").glob("step-*")] == ["step-00000006"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_named_and_leaves_nothing_partial(
    setting: Setting,
    whole: DistillJob,
    attempt: Callable[..., Any],
    tmp_path: Path,
    asynchronous: bool,
) -> None:
    """The limit of a file's size stands for a disk's: the kernel refuses the write likewise."""
    cut = job(setting, tmp_path / "cut", asynchronous=asynchronous)
    attempt(cut, at=4, what="stop")
    size = max(path.stat().st_size for path in (cut.folder / "checkpoints" / "step-00000004").iterdir())
    error = attempt(cut, world=2, limit=size // 4)["error"]
    assert "the checkpoint of step 8 can't be written" in error and "GiB are free there" in error
    assert "it goes on from step 4" in error
    names = {path.name for path in (cut.folder / "checkpoints").iterdir()}
    assert names == {"owner", "step-00000004"}
    attempt(cut)
    assert len(curve(cut)) == STEPS


def test_a_group_that_another_took_over_from_writes_nothing(
    setting: Setting, attempt: Callable[..., Any], tmp_path: Path
) -> None:
    cut = job(setting, tmp_path / "cut")
    attempt(cut, at=4, what="stop")
    before = sorted((cut.folder / "tables" / "steps").iterdir())
    with pytest.raises(ProcessRaisedException, match="another group of workers writes"):
        begin_group(_supplanted, 1, cut, tmp_path)
    assert sorted((cut.folder / "tables" / "steps").iterdir()) == before
    assert cut.saved() == 4


def _supplanted(rank: int, world: int, job: DistillJob, out: Path) -> None:
    """One whose folder is claimed by another at its sixth step."""
    store = torch.distributed.FileStore(str(out / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def report(kind: str, **fields: Any) -> None:
        if fields["step"] == 6:
            (job.folder / "checkpoints" / "owner").write_text("another")

    distill_worker(
        job, Worker(rank=0, world=1, device=torch.device("cpu"), report=report, stop_requested=lambda: False)
    )
