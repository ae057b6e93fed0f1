"""What is told of a step: finite figures, skipped steps, utilization, and a warning once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron_ray.core.hardware import peak_of
from minitron_ray.data.splits import Splits
from minitron_ray.distillation.divergence import rise
from minitron_ray.distillation.engine import Engine
from minitron_ray.distillation.loop import Share, Step
from minitron_ray.evaluation.measure import Measurement
from minitron_ray.experiment import Experiment
from minitron_ray.search.space import Candidate
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.step_log import StepLog

LENGTH = 16


def setting(folder: Path, engine: Engine) -> Setting:
    experiment = Experiment.model_validate(
        {
            "name": "log",
            "teacher": {"path": str(folder)},
            "data": {"sequence_length": LENGTH, "source": {"kind": "files", "path": "unused"}},
            "shape": {"hidden": 32},
            "distill": {"tokens": 1024},
        }
    )
    splits = Splits(calibration=range(1), validation=range(1, 2), train=range(2, 3))
    return Setting(
        experiment=experiment,
        teacher_folder=folder,
        tokens_folder=folder,
        splits=splits,
        micro_batch=1,
        engine=engine,
    )


def log_of(folder: Path, peak: float | None = None) -> tuple[StepLog, list[tuple[str, dict[str, Any]]]]:
    chosen, told = setting(folder, Engine(peak=peak)), list[tuple[str, dict[str, Any]]]()
    share = Share(world=2, device=torch.device("cpu"), dtype=torch.float32, micro_batch=1)
    log = StepLog(
        chosen,
        Candidate(layers=4, hidden=48, heads=6, kv_heads=3, mlp=96),
        share,
        teacher="online",
        stage="distill",
        total=1024,
        report=lambda kind, **fields: told.append((kind, fields)),
    )
    return log, told


def step(number: int, loss: float = 1.0, skipped: int = 0) -> Step:
    return Step(
        step=number,
        tokens=64 * number,
        loss=loss,
        logit_loss=loss,
        intermediate_loss=None,
        gradient_norm=loss,
        learning_rate=1e-3,
        tokens_per_second=500.0,
        stop_requested=False,
        skipped=skipped,
        memory=2**20,
    )


def measured(divergence: float) -> Measurement:
    return Measurement(losses=np.array([3.0]), divergences=np.array([divergence]))


def test_figures_that_are_not_finite_are_null_and_the_step_is_told(tiny_llama: Path) -> None:
    log, told = log_of(tiny_llama)
    log.add(step(1), None)
    log.add(step(2, math.nan, skipped=1), None)
    assert [row["skipped"] for row in log.rows] == [0, 1]
    assert [row["loss"] for row in log.rows] == [1.0, None] == [row["gradient_norm"] for row in log.rows]
    assert [fields.get("loss") for kind, fields in told if kind == "stage_progress"] == [1.0, None]
    (note,) = [fields["text"] for kind, fields in told if kind == "note"]
    assert "step 2 is skipped" in note


def test_utilization_is_counted_operations_over_the_peak(tiny_llama: Path) -> None:
    log, _ = log_of(tiny_llama, peak=1e9)
    log.add(step(1), None)
    # The tiny Llama by hand: 4 layers of hidden 48, 6 heads of 8 in 3 groups, MLP 96, 256 ids.
    matrices = 4 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 96) + 256 * 48
    forward = 2 * matrices + 4 * 2 * 48 * (LENGTH + 1)
    assert log.rows[0]["mfu"] == pytest.approx((3 + 1) * forward * 500.0 / (1e9 * 2))
    unknown, _ = log_of(tiny_llama)
    unknown.add(step(1), None)
    assert unknown.rows[0]["mfu"] is None


def test_a_rise_of_the_divergence_is_told_once_also_after_a_restart(tiny_llama: Path) -> None:
    log, told = log_of(tiny_llama)
    for number, divergence in enumerate((1.0, 0.8, 0.83, 0.9, 1.2), 1):
        log.add(step(number), measured(divergence))
    (note,) = [fields["text"] for kind, fields in told if kind == "note"]
    assert "rose from 0.8000 after 128 tokens to 0.9000 after 256; lower" in note
    again, told = log_of(tiny_llama)
    assert again.go_on(log.rows, 4) == 0
    again.add(step(5), measured(1.3))
    assert not [kind for kind, _ in told if kind == "note"]
    early, told = log_of(tiny_llama)
    early.go_on(log.rows, 3)  # the rise at step 4 had not come when it was cut off
    early.add(step(4), measured(0.9))
    assert [kind for kind, _ in told if kind == "note"] == ["note"]


def test_skipped_steps_in_a_row_outlive_a_restart(tiny_llama: Path) -> None:
    log, _ = log_of(tiny_llama)
    for number, skipped in enumerate((0, 1, 2, 0), 1):
        log.add(step(number, math.inf if skipped else 1.0, skipped), None)
    assert [log_of(tiny_llama)[0].go_on(log.rows, last) for last in (1, 2, 3, 4)] == [0, 1, 2, 0]


def test_up_to_a_twentieth_is_no_rise() -> None:
    assert rise([]) is None and rise([(1, 2.0)]) is None
    assert rise([(1, 2.0), (2, 1.0), (3, 1.05)]) is None
    assert rise([(1, 2.0), (2, 1.0), (3, 1.06), (4, 0.5)]) is not None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name_or_not_at_all(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak
