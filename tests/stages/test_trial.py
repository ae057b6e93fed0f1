"""`retrain`: going on from a rung is the same as never having stopped."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_ray.core.errors import MinitronError
from minitron_ray.data.splits import Splits
from minitron_ray.experiment import Experiment
from minitron_ray.importance.scores import Scores
from minitron_ray.search.space import Candidate
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.trial import RungResult, latency, retrain, rung_tokens
from minitron_ray.stages.trial_state import FileState
from tests.settings import setting_of

CANDIDATE = Candidate(layers=3, hidden=36, heads=3, kv_heads=3, mlp=64)


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
                "retrain": {"tokens": 1024, "rungs": 3, "learning_rate": 3e-3},
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


def trained(setting: Setting, stop_after: int | None = None, file: Path | None = None) -> list[RungResult]:
    """What `on_rung` hears; stopped after so many steps of this call."""
    share = setting.share()
    student, teacher = setting.student(CANDIDATE, scores(), share.device), setting.online_teacher(share)
    heard: list[RungResult] = []
    steps = iter(range(10_000))
    rungs = retrain(
        setting,
        student,
        teacher,
        share,
        on_rung=heard.append,
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


@pytest.mark.parametrize(("stop_after", "rungs_kept"), [(1, 0), (3, 2), (6, 3)])
def test_going_on_from_the_last_rung(
    setting: Setting, whole: list[RungResult], tmp_path: Path, stop_after: int, rungs_kept: int
) -> None:
    file = tmp_path / "trials" / "c" / "rung.pt"
    first = figures(trained(setting, stop_after, file))
    assert first == whole[: len(first)] and file.exists() == (rungs_kept > 0)
    assert figures(trained(setting, file=file)) == whole
    assert [path.name for path in tmp_path.rglob("*.partial")] == []


def test_seconds_are_those_of_all_attempts(setting: Setting, tmp_path: Path) -> None:
    file = tmp_path / "rung.pt"
    before = trained(setting, 5, file)[-1]
    state = torch.load(file, weights_only=True)
    state["note"]["rungs"][-1]["seconds"] = 1000.0 + before.seconds
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


def test_a_loss_that_is_not_finite_ends_the_training(setting: Setting) -> None:
    share = setting.share()
    student, teacher = setting.student(CANDIDATE, scores(), share.device), setting.online_teacher(share)
    with torch.no_grad():
        student.head.fill_(float("nan"))
    with pytest.raises(
        MinitronError, match=r"validation loss nan after 0 steps is not finite; lower learning_rate"
    ):
        retrain(setting, student, teacher, share, on_rung=lambda rung: None)


def test_latency_is_a_time_of_the_student_alone(setting: Setting) -> None:
    share = setting.share()
    student = setting.student(CANDIDATE, scores(), share.device)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert 0 < latency(student, share, setting) < 10
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_a_kept_state_leaves_the_process_as_it_was(setting: Setting, tmp_path: Path) -> None:
    """It is written without checksums; what else is saved has them."""
    file, before = tmp_path / "rung.pt", torch.serialization.get_crc32_options()
    trained(setting, 3, file)
    assert torch.serialization.get_crc32_options() is before is True
    (tmp_path / f"other.pt.{os.getpid()}.partial").mkdir()
    with pytest.raises(RuntimeError, match="Is a directory"):
        trained(setting, 3, tmp_path / "other.pt")
    assert torch.serialization.get_crc32_options() is True
