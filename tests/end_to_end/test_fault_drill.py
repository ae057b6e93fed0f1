"""The short form of the fault drill: what is killed, filled up and cut off costs nothing but time."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.results.store import read_table

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DRILL = Path(__file__).parents[2] / "benchmarks" / "fault_drill.py"
INTERVAL = 10
"""Steps between two checkpoints there."""


def steps(results: Path) -> list[dict[str, Any]]:
    return sorted(read_table(results, "steps").to_pylist(), key=lambda row: row["step"])


def test_a_distillation_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(DRILL), "--short", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    calm, disturbed = steps(tmp_path / "calm"), steps(tmp_path / "disturbed")
    assert [row["step"] for row in disturbed] == list(range(1, len(calm) + 1))
    for figure in ("loss", "gradient_norm", "val_loss", "tokens", "learning_rate"):
        assert [row[figure] for row in disturbed] == [row[figure] for row in calm], figure
    with (tmp_path / "report" / "faults.csv").open() as stream:
        faults = list(csv.DictReader(stream))
    assert [fault["kind"] for fault in faults] == ["worker", "unplugged", "disk", "driver"]
    assert all(int(fault["steps_lost"]) < 2 * INTERVAL for fault in faults)
    by_kind = {fault["kind"]: fault for fault in faults}
    assert by_kind["driver"]["driver_exit"] == "-9"
    assert by_kind["worker"]["restarted"] == "True" and by_kind["worker"]["driver_exit"] == ""
    assert by_kind["unplugged"]["driver_exit"] == ""
