"""Which hardware a plan is timed for, and the probe on a network that takes no time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.execution.settings import ClusterSettings, Devices
from minitron_ray.experiment import Experiment
from minitron_ray.plan import Plan, make_plan
from minitron_ray.results.cache import Cache
from minitron_ray.stages import probe as probing
from minitron_ray.stages.hardware import MEASURED, Probe, cost_rows, known_hardware, probed_hardware
from minitron_ray.stages.probe import probe

FOUND = Probe(name="this machine (2 cores)", count=1, flops=5e10, memory=2**34, accelerator=False)


@pytest.fixture
def plan(tiny_llama: Path) -> Plan:
    return plan_of(tiny_llama)


def plan_of(folder: Path, **sizes: int) -> Plan:
    experiment = Experiment.model_validate(
        {
            "name": "tiny",
            "teacher": {"path": "./teacher"},
            "data": {"source": {"kind": "files", "path": "t"}, "sequence_length": 32},
            "shape": {"mlp": 64},
        }
    )
    return make_plan(experiment, json.loads((folder / "config.json").read_text()) | sizes)


def test_the_cluster_files_devices_go_first(plan: Plan, tmp_path: Path) -> None:
    settings, cache = ClusterSettings(devices=Devices(kind="h200", count=4)), Cache(tmp_path)
    probed_hardware(ClusterSettings(), cache, plan, lambda *_: FOUND)
    hardware = known_hardware(settings, cache, plan)
    assert hardware is not None and (hardware.name, hardware.count) == ("h200", 4)


def test_a_machine_is_measured_once(plan: Plan, tmp_path: Path) -> None:
    calls = []

    def measure(plan: Plan, micro_batch: int) -> Probe:
        calls.append(micro_batch)
        return FOUND

    cache, settings = Cache(tmp_path), ClusterSettings(micro_batch=2)
    assert known_hardware(settings, cache, plan) is None
    assert probed_hardware(settings, cache, plan, measure) == probed_hardware(settings, cache, plan, measure)
    assert calls == [2]
    hardware = known_hardware(ClusterSettings(), cache, plan)
    assert hardware is not None and (hardware.flops, hardware.source) == (5e10, MEASURED)
    # The speed of this machine says nothing about a cluster elsewhere.
    assert known_hardware(ClusterSettings(address="10.0.0.1:6379"), cache, plan) is None


def test_another_teacher_is_measured_by_itself(plan: Plan, tiny_llama: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    probed_hardware(ClusterSettings(), cache, plan, lambda *_: FOUND)
    assert known_hardware(ClusterSettings(), cache, plan_of(tiny_llama, intermediate_size=128)) is None


def test_rows_of_the_table(plan: Plan, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert {row["device_seconds"] for row in cost_rows(ClusterSettings(), cache, plan)} == {None}
    probed_hardware(ClusterSettings(), cache, plan, lambda *_: FOUND)
    for row, cost in zip(cost_rows(ClusterSettings(), cache, plan), plan.costs(), strict=True):
        assert (row["stage"], row["devices"]) == (cost.stage, 1)
        assert row["device_seconds"] == pytest.approx(cost.flops / 5e10)


def test_the_probe_measures_this_machine(plan: Plan) -> None:
    import torch

    threads, started = torch.get_num_threads(), time.perf_counter()
    found = probe(plan, micro_batch=4)
    assert time.perf_counter() - started < 30
    assert torch.get_num_threads() == threads
    assert found.count >= 1 and found.memory and 1e6 < found.flops < 1e16


def test_the_probe_refuses_what_does_not_fit(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "free_memory", lambda device: 2**20)
    with pytest.raises(
        EnvironmentFailure, match=r"3 of the teacher's layers, which takes about .* 1\.0 MiB are"
    ):
        probe(plan, micro_batch=4)


def test_a_slow_machine_probes_fewer_and_shorter_sequences(plan: Plan) -> None:
    arch = plan.teacher
    assert probing._affordable(plan.family, arch, 1e12, 4, 1024) == (4, 1024)
    assert probing._affordable(plan.family, arch, 1.0, 4, 1024) == (1, 128)
