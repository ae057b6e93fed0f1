"""A trial of two processes beside one of one, baselines of two, and a teacher that two processes share: the same
losses as in one, the same bytes of the teacher, and none waits for another's place for ever."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment
from minitron_ray.plan import Layout, make_plan
from minitron_ray.plan.training_memory import FITS, TrainingMemory
from tests.end_to_end.desk import HEAD, Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEARCH = (
    HEAD
    + """\
budget: {parameters: 75k, tolerance: 20%}
search:
  space: {layers: 3..4, mlp: [64, 96]}
  trials: 2
  baselines: [largest_first, scratch]
  zero_shot: null
  retrain: {tokens: 1024, rungs: 2, batch: 4, learning_rate: 3e-3}
"""
)


def run(desk: Desk) -> set[str]:
    """A run to its end; the names of the groups of processes that there were."""
    process, groups = desk.start("run", "tiny.yaml", "--cluster", "cluster.yaml"), set[str]()
    deadline = time.monotonic() + 500
    while process.poll() is None:
        assert time.monotonic() < deadline
        groups |= {path.name for path in desk.results.glob("tiny/*/ray/train/group-*")}
        time.sleep(0.05)
    out, err = process.communicate()
    assert process.returncode == 0, f"{out}\n{err}"
    return groups


def memory_for(desk: Desk, name: str) -> int:
    """Bytes of the smallest machine of which a half holds this candidate's trial, by what is counted."""
    experiment = load(desk.folder / "tiny.yaml", Experiment)[0]
    plan = make_plan(experiment, json.loads((desk.folder / "model" / "config.json").read_text()))
    training = TrainingMemory.of(experiment, plan.family, plan.teacher, Layout(accelerator=True))
    return 2 * math.ceil(training.trial(plan.candidate(name).architecture(plan.start)) / FITS)


def groups_of(rows: list[dict[str, Any]], alone: str) -> int:
    """How many groups these rows come from: one a rung of a trial that is not alone, one for all cuts that are
    scored, as groups work one at a time, one a baseline that is trained. And two that share the teacher: one
    stores its signal, one evaluates."""
    rungs = [
        row for row in rows if row["origin"] == "search" and row["tokens"] and row["candidate_id"] != alone
    ]
    cuts = any(row["origin"] == "largest_first" and row["rung"] == 0 for row in rows)
    others = [row for row in rows if row["origin"] != "search" and row["status"] == "completed"]
    return len(rungs) + cuts + sum(not row["copied"] for row in others) + 2


def stored(desk: Desk) -> dict[str, bytes]:
    """What is kept of the teacher, by block and array."""
    blocks = desk.results / ".cache" / "teacher_signal"
    return {str(path.relative_to(blocks)): path.read_bytes() for path in blocks.glob("*/*.bin")}


@pytest.mark.timeout(900)
def test_a_group_trains_as_one_process_does(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> None:
    found, signals, evaluations, alone = {}, {}, {}, ""
    for name in ("one", "group"):
        desk = Desk.lay(tmp_path / name, tiny_llama, tiny_text)
        (desk.folder / "tiny.yaml").write_text(SEARCH)
        settings = "trial: {cpus: 1}\n"
        if name == "group":
            # Two trials want to run at a time; on two CPUs there is no room for three processes.
            settings += "trial_workers: 2\nteacher: sharded\n"
            settings += f"devices: {{flops: 1B, memory: {memory_for(desk, alone)}}}\n"
        (desk.folder / "cluster.yaml").write_text(settings)
        groups = run(desk)
        rows = desk.rows("trials")
        found[name] = {(row["origin"], row["candidate_id"], row["tokens"]): row for row in rows}
        if name == "one":
            sizes = {row["candidate_id"]: row["parameters"] for row in desk.rows("candidates")}
            alone = min((row["candidate_id"] for row in rows if row["origin"] == "search"), key=sizes.get)
        assert len(groups) == (groups_of(rows, alone) if name == "group" else 0)
        assert not (desk.run_folder() / "trials").exists()
        signals[name] = stored(desk)
        measured = desk.rows("evaluations")
        evaluations[name] = {(row["subject"], row["phase"], row["metric"]): row["value"] for row in measured}
        desk.clear()
    assert signals["one"] and signals["group"] == signals["one"]
    assert evaluations["one"] and evaluations["group"] == pytest.approx(evaluations["one"], abs=1e-4)
    searched = [key for key in found["one"] if key[0] == "search"]
    assert found["one"].keys() == found["group"].keys() and len(searched) == 5
    assert {key[0] for key in found["one"]} == {"search", "largest_first", "scratch"}
    for key, row in found["one"].items():
        other = found["group"][key]
        assert row["status"] == other["status"] and row["final"] == other["final"]
        for figure in ("val_loss", "val_divergence", "train_loss"):
            assert other[figure] == pytest.approx(row[figure], abs=1e-4), (key, figure)
