"""Where a streamed teacher's hidden states go, and whether its weights stay: by whose memory that is decided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron_ray.data.splits import Splits
from minitron_ray.execution.room import fit
from minitron_ray.execution.settings import Resources
from minitron_ray.experiment import Experiment
from minitron_ray.stages.scoring import Work, fits, worthwhile
from minitron_ray.stages.setting import Setting

STATES = 10 * 32 * 48 * 4
"""Bytes of ten sequences' hidden states in float32."""
WEIGHTS = 95_664 * 4
PLENTY = 2**40


@pytest.fixture
def setting(tiny_llama: Path, tmp_path: Path) -> Setting:
    experiment = Experiment.model_validate(
        {
            "name": "x",
            "precision": "float32",
            "teacher": {"path": str(tiny_llama)},
            "data": {"source": {"kind": "files", "path": "*.txt"}, "sequence_length": 32},
            "shape": {"mlp": 48},
        }
    )
    splits = Splits(calibration=range(10), validation=range(10, 12), train=range(12, 14))
    return Setting(
        experiment=experiment, teacher_folder=tiny_llama, tokens_folder=tmp_path, splits=splits, micro_batch=2
    )


@pytest.mark.parametrize(
    ("size", "free", "sharing", "share", "expected"),
    [
        (25, 100, 1, 0.25, True),
        (26, 100, 1, 0.25, False),
        (5, 100, 5, 0.25, True),
        (6, 100, 5, 0.25, False),
        (0, 0, 8, 0.25, True),
        # 8 workers of a machine with 1 TB free, of devices with 80 GB each: 20 GB fit, 40 GB do not.
        (20 * 10**9, 10**12, 8, 0.25, True),
        (40 * 10**9, 10**12, 8, 0.25, False),
    ],
)
def test_a_share_of_a_memory_among_several(
    size: int, free: int, sharing: int, share: float, expected: bool
) -> None:
    assert fits(size, free, sharing, share) is expected


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("together", [1, 2, 8])
def test_hidden_states_are_held_against_the_machines_memory(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, together: int
) -> None:
    """Whatever an accelerator has free, and divided among the workers that are on the machine."""
    folder = tmp_path / "states"
    work = Work(setting=setting, mode="auto", workers=8, together=together, folder=folder)
    monkeypatch.setattr("minitron_ray.stages.setting.local_device", lambda: torch.device(kind))
    least = 4 * STATES * together
    for host, accelerator, where in ((least, 0, None), (least - 1, PLENTY, folder)):
        free = {"cpu": host, "cuda": accelerator}
        monkeypatch.setattr(
            "minitron_ray.stages.scoring.free_memory", lambda device, free=free: free[device.type]
        )
        assert work.streams_folder(10, 1) == where


@pytest.mark.parametrize(("kind", "sharing"), [("cpu", 4), ("cuda", 1)])
def test_weights_are_held_against_the_devices_memory(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, sharing: int
) -> None:
    """Of an accelerator a worker has all."""
    work = Work(setting=setting, mode="auto", workers=8, together=4, folder=tmp_path)
    monkeypatch.setattr("minitron_ray.stages.setting.local_device", lambda: torch.device(kind))
    for factor, resident in ((1.01, True), (0.99, False)):
        free = int(WEIGHTS * sharing / 0.6 * factor)
        monkeypatch.setattr(
            "minitron_ray.stages.scoring.free_memory",
            lambda device, free=free: {kind: free}[device.type],
        )
        assert work.resident() is resident


@pytest.mark.parametrize(
    ("node", "each", "expected"),
    [
        ({"CPU": 16.0, "GPU": 8.0}, Resources(gpus=1), 8),
        ({"CPU": 6.0, "GPU": 8.0}, Resources(gpus=1), 6),
        ({"CPU": 16.0}, Resources(gpus=1), 0),
        ({"CPU": 7.0}, Resources(cpus=2), 3),
    ],
)
def test_workers_of_one_node(node: dict[str, float], each: Resources, expected: int) -> None:
    assert fit(node, each) == expected


def test_no_process_is_started_that_would_do_less_than_its_start_takes() -> None:
    assert worthwhile(0, 8) == worthwhile(1e9, 8) == 1
    assert worthwhile(1e15, 8) == 8 and worthwhile(1e15, 1) == 1
    counts = [worthwhile(operations, 64) for operations in range(0, 10**14, 10**11)]
    assert counts == sorted(counts) and set(counts) == set(range(1, 65))
