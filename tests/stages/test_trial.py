"""`retrain`: going on from a rung is the same as never having stopped."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron_ray.core.errors import EnvironmentFailure, MinitronError
from minitron_ray.data.splits import Splits
from minitron_ray.distillation.loop import Step
from minitron_ray.execution.train_group import Worker
from minitron_ray.experiment import Experiment
from minitron_ray.importance.scores import Scores
from minitron_ray.search.space import Candidate
from minitron_ray.stages import trial
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.trial import RungResult, latency, retrain, rung_tokens
from minitron_ray.stages.trial_group import GroupTrial, to_next_rung
from minitron_ray.stages.trial_state import FileState
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from tests.processes import begin_group
from tests.settings import setting_of

STEPS = 8
CANDIDATE = Candidate(layers=3, hidden=36, heads=3, kv_heads=3, mlp=64)


class Killed(BaseException):
    """What no handler of errors takes for one, as the end of a process."""


@pytest.fixture(scope="module")
def setting(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("setting")
    source = {"kind": "files", "path": f"{tiny_text}/**/*.txt"}
    experiment = Experiment.model_validate(
        {
            "name": "x",
            "precision": "float32",
            "teacher": {"path": str(tiny_llama)},
            "data": {"source": source, "sequence_length": 32},
            "budget": {"parameters": "50k..90k"},
            "search": {
                "space": {"hidden": [36, 42]},
                "retrain": {"tokens": 1024, "rungs": 3, "batch": 4, "learning_rate": 3e-3},
            },
        }
    )
    splits = Splits(calibration=range(4), validation=range(4, 8), train=range(8, 40))
    return setting_of(experiment, tiny_llama, folder, splits)


def scores() -> Scores:
    draw = np.random.default_rng(0).random
    return Scores(
        hidden=draw(48), heads=draw((4, 6)), kv_heads=draw((4, 3)), mlp=draw((4, 96)), layers=draw(4)
    )


def trained(
    setting: Setting,
    stop_after: int | None = None,
    file: Path | None = None,
    killed_after: int | None = None,
    made: list[int] | None = None,
) -> list[RungResult]:
    """What `on_rung` hears; stopped after so many steps of this call, or killed behind that step. The steps
    that are made go to `made`."""
    share = setting.share()
    student, teacher = setting.student(CANDIDATE, scores(), share.device), setting.online_teacher(share)
    heard: list[RungResult] = []
    steps = iter(range(10_000))

    def on_step(step: Step) -> None:
        if made is not None:
            made.append(step.step)
        if step.step == killed_after:
            raise Killed

    rungs = retrain(
        setting,
        student,
        teacher,
        share,
        on_rung=heard.append,
        on_step=on_step,
        stop=lambda: stop_after is not None and next(steps) + 1 >= stop_after,
        resume=FileState(file) if file else None,
    )
    assert rungs == heard and (not rungs or rungs[-1].final == (stop_after is None))
    return heard


def figures(heard: list[RungResult]) -> list[RungResult]:
    return [replace(rung, seconds=0.0) for rung in heard]


@pytest.fixture(scope="module")
def whole(setting: Setting) -> list[RungResult]:
    return figures(trained(setting))


def test_rungs_of_one_training(setting: Setting, whole: list[RungResult]) -> None:
    assert rung_tokens(setting) == (256, 512, 1024)
    assert [rung.tokens for rung in whole] == [0, 256, 512, 1024]
    assert [rung.final for rung in whole] == [False, False, False, True]
    assert whole[0].train_loss is None and whole[-1].val_divergence < whole[0].val_divergence  # type: ignore[operator]
    # Compared with the teacher as it was cut and at the end; halving goes by the loss.
    assert [rung.val_divergence is None for rung in whole] == [False, True, True, False]
    for rung in whole:
        assert rung.val_loss == pytest.approx(np.mean(rung.losses)) and len(rung.losses) == 4


@pytest.mark.parametrize("stop_after", [1, 2, 3, 6])
def test_going_on_from_where_it_was_stopped(
    setting: Setting, whole: list[RungResult], tmp_path: Path, stop_after: int
) -> None:
    """At a rung or between two: no step is made twice, and no figure differs, the mean of the losses of steps
    on both sides of the stop included."""
    file, made = tmp_path / "trials" / "c" / "rung.pt", list[int]()
    first = figures(trained(setting, stop_after, file, made=made))
    assert first == whole[: len(first)]
    assert figures(trained(setting, file=file, made=made)) == whole
    assert made == list(range(1, STEPS + 1))
    assert [path.name for path in tmp_path.rglob("*.partial")] == []


@pytest.mark.parametrize(("save_after", "again_from"), [(0.0, 6), (60.0, 4)])
def test_going_on_from_where_it_was_killed(
    setting: Setting,
    whole: list[RungResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_after: float,
    again_from: int,
) -> None:
    """Behind the seventh of eight steps, before what follows it: from the last step where enough time had
    passed, or else from the rung at the fourth."""
    monkeypatch.setattr(trial, "_SAVE_AFTER_S", save_after)
    file, made = tmp_path / "rung.pt", list[int]()
    with pytest.raises(Killed):
        trained(setting, file=file, killed_after=7)
    left = tmp_path / "rung.pt.1.partial"
    left.write_bytes(b"half of a state")
    assert figures(trained(setting, file=file, made=made)) == whole
    assert made == list(range(again_from + 1, STEPS + 1)) and not left.exists()


def test_a_state_of_an_earlier_release_is_gone_on_from(
    setting: Setting, whole: list[RungResult], tmp_path: Path
) -> None:
    """Its note, always of a rung, has neither losses nor seconds of its own."""
    file, made = tmp_path / "rung.pt", list[int]()
    trained(setting, 4, file)
    state = torch.load(file, weights_only=True)
    assert state["note"].pop("losses") == [] and state["note"].pop("seconds") > 0
    torch.save(state, file)
    assert figures(trained(setting, file=file, made=made)) == whole and made == [5, 6, 7, 8]


def test_a_full_disk_is_said_and_takes_nothing_away(
    setting: Setting, whole: list[RungResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full takes no byte, as a disk without room."""
    file = tmp_path / "rung.pt"
    trained(setting, 3, file)
    before, partial = file.read_bytes(), tmp_path / f"rung.pt.{os.getpid()}.partial"
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: save(state, "/dev/full"))
    with pytest.raises(
        EnvironmentFailure,
        match=r"rung\.pt: the state of step 4 can't be written: .*make room, then run the same",
    ):
        trained(setting, file=file)
    monkeypatch.undo()
    assert file.read_bytes() == before and not partial.exists()
    assert figures(trained(setting, file=file)) == whole


def test_seconds_are_those_of_all_attempts(setting: Setting, tmp_path: Path) -> None:
    file = tmp_path / "rung.pt"
    before = trained(setting, 5, file)[-1]
    state = torch.load(file, weights_only=True)
    assert state["note"]["seconds"] > before.seconds, "with the steps since the rung"
    state["note"]["seconds"] = 1000.0
    torch.save(state, file)
    assert trained(setting, file=file)[-1].seconds > 1000.0


@pytest.mark.parametrize("damage", ["torn", "another recipe"])
def test_a_checkpoint_that_is_of_no_use_is_not_used(
    setting: Setting, whole: list[RungResult], tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "rung.pt"
    trained(setting, 5, file)
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        state = torch.load(file, weights_only=True)
        state["note"]["recipe"] = "other"
        torch.save(state, file)
    assert figures(trained(setting, file=file)) == whole


def _rank(rank: int, world: int, trial_: GroupTrial, out: Path) -> None:
    """A group of two real processes, interrupted in each way; against one that was left alone."""
    store = torch.distributed.FileStore(str(out / "rendezvous"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)

    def run(
        folder: str, stop_after: int | None = None, killed_at: int | None = None
    ) -> tuple[list[RungResult], list[int]]:
        made: list[int] = []

        def report(kind: str, **fields: Any) -> None:
            made.append(fields["tokens"] // 128)
            if made[-1] == killed_at:
                raise Killed

        worker = Worker(
            rank=rank,
            world=world,
            device=torch.device("cpu"),
            report=report,
            stop_requested=lambda: rank == 1 and stop_after is not None and len(made) + 1 >= stop_after,
        )
        try:
            return figures(to_next_rung(replace(trial_, folder=out / folder), worker)), made
        except Killed:
            return [], made

    alone = [run("alone") for _ in range(3)]
    assert [made for _, made in alone] == [[1, 2], [3, 4], [5, 6, 7, 8]]
    whole = alone[-1][0]
    assert whole[-1].final
    assert run("other", stop_after=1) == (whole[:1], [1])
    assert run("other") == (whole[:2], [2])
    trial._SAVE_AFTER_S = 0.0 if rank == 0 else math.inf  # type: ignore[misc]
    assert run("other", killed_at=4) == ([], [3, 4])
    if rank == 0:  # as one that was cut off between its checkpoint and what belongs to it
        (out / "other" / "rungs-00000003.json").unlink()
    torch.distributed.barrier()
    assert run("other") == (whole[:3], [3, 4])
    assert run("other", killed_at=7) == ([], [5, 6, 7])
    assert run("other") == (whole, [7, 8])
    torch.distributed.destroy_process_group()


def test_a_group_goes_on_from_where_it_was_ended(setting: Setting, tmp_path: Path) -> None:
    """Stopped or killed between two rungs. It is rank 0 that says when to save."""
    job = GroupTrial(setting=setting, scores=scores(), candidate=CANDIDATE, signal=None, folder=tmp_path)
    begin_group(_rank, 2, job, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_training(setting: Setting) -> None:
    """Before the first step it is not the learning rate that is too high."""
    share = setting.share()
    student, teacher = setting.student(CANDIDATE, scores(), share.device), setting.online_teacher(share)

    def spoil(rung: RungResult | None = None) -> None:
        with torch.no_grad():
            student.head.fill_(float("nan"))

    with pytest.raises(MinitronError, match=r"nan after [1-9]\d* steps is not finite; lower learning_rate"):
        retrain(setting, student, teacher, share, on_rung=spoil)
    spoil()
    with pytest.raises(MinitronError, match=r"nan of the undistilled student .*: set `precision: float32`"):
        retrain(setting, student, teacher, share, on_rung=lambda rung: None)


def test_latency_is_a_time_of_the_student_as_it_is_served(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the precision of products, and to the logits of the last token, as a stock forward pass gives them."""
    share = replace(setting.share(), dtype=torch.bfloat16)
    student = setting.undistilled(CANDIDATE, scores(), share)
    assert student.head.dtype == torch.bfloat16
    ids, given = torch.from_numpy(setting.tokens().sequences(setting.training_indices(1, 1)[:1])), []
    forward = Headless.forward

    def heard(self: Headless, *arguments: Any) -> Any:
        given.append(forward(self, *arguments))
        return given[-1]

    monkeypatch.setattr(Headless, "forward", heard)
    assert 0 < latency(student, share, setting) < 10
    with torch.no_grad():
        expected = student.model(input_ids=ids, use_cache=False).logits[:, -1]
    assert len(given) > 1 and all(torch.equal(found, expected) for found in given)


def test_a_kept_state_leaves_the_process_as_it_was(setting: Setting, tmp_path: Path) -> None:
    """It is written without checksums; what else is saved has them."""
    file, before = tmp_path / "rung.pt", torch.serialization.get_crc32_options()
    trained(setting, 3, file)
    assert torch.serialization.get_crc32_options() is before is True


def test_a_students_weights_are_read_as_they_are_asked_for(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank of a group holds what is not in its shards: a cut begins with nothing read."""
    read: list[str] = []
    tensor = Checkpoint.tensor

    def noting(self: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return tensor(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", noting)
    _, weights = setting.cut(CANDIDATE, scores(), torch.float32)
    assert not read and "model.norm.weight" in weights and not read
    assert weights["model.norm.weight"].shape == (36,)
    assert read == ["model.norm.weight"]
