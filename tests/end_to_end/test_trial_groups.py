"""Trials of two processes each: the same losses as in one, and no trial waits for another's place for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.desk import Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEARCH = """
name: tiny
precision: float32
teacher: {path: ./model}
data:
  source: {kind: files, path: "text/**/*.txt"}
  sequence_length: 32
  calibration: 8
  validation: 8
budget: {parameters: 75k, tolerance: 20%}
search:
  space: {layers: 3..4, mlp: [64, 96]}
  trials: 2
  retrain: {tokens: 1024, rungs: 2, learning_rate: 3e-3}
"""


def test_a_group_trains_as_one_process_does(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> None:
    found = {}
    for name, workers in (("one", 1), ("group", 2)):
        desk = Desk.lay(tmp_path / name, tiny_llama, tiny_text)
        (desk.folder / "tiny.yaml").write_text(SEARCH)
        # Two trials want to run at a time; on two CPUs only one has both of its processes.
        (desk.folder / "cluster.yaml").write_text(f"trial_workers: {workers}\ntrial: {{cpus: 1}}\n")
        desk.run("--cluster", "cluster.yaml")
        rows = desk.rows("trials")
        found[name] = {(row["candidate_id"], row["tokens"]): row for row in rows}
        assert not (desk.run_folder() / "trials").exists()
        desk.clear()
    assert found["one"].keys() == found["group"].keys() and len(found["one"]) == 5
    for key, row in found["one"].items():
        other = found["group"][key]
        assert row["status"] == other["status"] and row["final"] == other["final"]
        for figure in ("val_loss", "val_divergence", "train_loss"):
            assert other[figure] == pytest.approx(row[figure], abs=1e-4), (key, figure)
