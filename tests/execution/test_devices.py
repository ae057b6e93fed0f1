"""`devices` of a cluster file: what is known of a kind, what is given, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_ray.core.bounds import ByteBounds
from minitron_ray.core.errors import ConfigError
from minitron_ray.core.hardware import rate_text
from minitron_ray.core.loading import load
from minitron_ray.execution.settings import ClusterSettings, Devices


def devices(folder: Path, text: str) -> Devices:
    path = folder / "cluster.yaml"
    path.write_text(f"devices: {text}\n")
    found = load(path, ClusterSettings)[0].devices
    assert found is not None
    return found


def test_a_kind_is_enough(tmp_path: Path) -> None:
    hardware = devices(tmp_path, "{kind: h100, count: 8}").hardware()
    assert (hardware.flops, hardware.memory, hardware.count) == (0.4 * 989e12, 80 * 2**30, 8)
    assert hardware.text() == "8 x h100 at 396 TFLOP/s each (40% of 989 TFLOP/s)"
    assert hardware.device_seconds(3600 * 0.4 * 989e12) == pytest.approx(3600)


def test_what_is_given_goes_before_what_is_known(tmp_path: Path) -> None:
    text = "{kind: a100, flops: 400T, memory: 40GiB, utilization: 0.5}"
    hardware = devices(tmp_path, text).hardware()
    assert (hardware.flops, hardware.memory) == (200e12, 40 * 2**30)
    assert devices(tmp_path, "{flops: 100B, memory: 64 GB}").hardware().memory == 64 * 10**9
    assert devices(tmp_path, "{flops: 1T}").hardware().memory is None


@pytest.mark.parametrize("size", ["80G", "80 GiB", "79.5gb", "1_048_576", ".5TiB"])
def test_a_devices_memory_is_written_as_a_budgets_is(tmp_path: Path, size: str) -> None:
    assert devices(tmp_path, f"{{flops: 1T, memory: {size!r}}}").memory == ByteBounds.read(size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: h1000}", r"devices\.kind: 'h1000' is not known here; known are a100, h100, h200, b200; for"),
        ("{count: 8}", r"devices: give a kind \(a100, h100, h200, b200\) or flops"),
        ("{kind: h100, utilization: 40}", r"devices\.utilization"),
        ("{kind: h100, memory: plenty}", r"devices\.memory: expected bytes \(80GiB, 24GB\), found 'plenty'"),
        ("{kind: h100, memory: 0}", r"devices\.memory: must be at least 1 byte"),
        ("{kind: h100, number: 8}", r"devices\.number"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        devices(tmp_path, text)


@pytest.mark.parametrize(
    ("flops", "text"),
    [(2.25e15, "2.2 PFLOP/s"), (3.956e14, "396 TFLOP/s"), (8.02e10, "80.2 GFLOP/s"), (5e7, "50.0 MFLOP/s")],
)
def test_speeds_for_people(flops: float, text: str) -> None:
    assert rate_text(flops) == text
