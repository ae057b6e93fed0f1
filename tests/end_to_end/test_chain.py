"""A family: the student of one experiment is cut again by a second, which learns from the first's teacher."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from minitron_ray.results.runs import RunInfo, find_runs
from minitron_ray.weights.checkpoint import Checkpoint
from tests.end_to_end.desk import EXPERIMENT, Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FIRST = EXPERIMENT.replace("trials: 7", "trials: 2").replace("tokens: 32k", "tokens: 4k")
SECOND = (
    FIRST.replace("name: tiny", "name: tinier")
    .replace("teacher: {path: ./model}", "teacher: {path: ./model}\nstart: {experiment: tiny}")
    .replace("75k, tolerance: 10%", "35k..70k")
    .replace("layers: 3..4, mlp: 48..96 by 16, heads: [3, 6]", "layers: 2..3, mlp: 32..48 by 16")
)
FILES = ("tinier.yaml", "tiny.yaml")
"""The second one first: the order is the program's to find."""


@pytest.fixture
def pair(desk: Desk) -> Desk:
    (desk.folder / "tiny.yaml").write_text(FIRST)
    (desk.folder / "tinier.yaml").write_text(SECOND)
    return desk


def infos(desk: Desk) -> dict[str, RunInfo]:
    return {info.experiment: info for info in find_runs(desk.results)}


def test_a_chain_that_is_interrupted_goes_on_to_its_second_student(pair: Desk) -> None:
    _, err = pair.call("run", "tinier.yaml", expect=2)
    assert "there is no run of tiny in" in err and "name its file in the same command" in err
    out, _ = pair.call("plan", *FILES)
    assert "the largest shape of tiny, which has no student yet" in out

    def second_learns() -> bool:
        return any(pair.results.glob("tinier/*/stages/teacher.json"))

    code, err = pair.stop_when(second_learns, signal.SIGINT, files=FILES, patience=400)
    assert code == 130 and "to go on, run it again" in err
    found = infos(pair)
    assert found["tiny"].status == "succeeded" and found["tinier"].status == "interrupted"
    first_export = (found["tiny"].folder / "stages" / "export.json").read_bytes()
    out, err = pair.call("run", *FILES, "--json")
    assert "Traceback" not in err
    assert [ranking["experiment"] for ranking in json.loads(out)] == ["tiny", "tinier"]
    out, _ = pair.call("plan", *FILES)
    assert f"student of tiny/{found['tiny'].run_id}" in out and "the largest shape" not in out
    out, _ = pair.call("plan", *FILES, "--set", "seed=1")
    assert "student of tiny/" not in out and "the largest shape of tiny, which has no student yet" in out
    assert (found["tiny"].folder / "stages" / "export.json").read_bytes() == first_export

    first, second = (infos(pair)[name] for name in ("tiny", "tinier"))
    assert second.run_id == found["tinier"].run_id and second.status == "succeeded"
    exports = [
        json.loads((info.folder / "stages" / "export.json").read_bytes())["output"]["paths"]
        for info in (first, second)
    ]
    folders = [
        info.folder / path
        for info, paths in zip((first, second), exports, strict=True)
        for path in paths.values()
    ]
    start, student = folders
    prepared = json.loads((second.folder / "stages" / "prepare.json").read_bytes())["output"]
    assert prepared["start_digest"] == Checkpoint(start).digest() != prepared["teacher_digest"]
    assert prepared["teacher_digest"] == Checkpoint(pair.folder / "model").digest()
    check_scores(second, start)
    check_signal(first, second)
    card = (student / "README.md").read_text()
    assert "| | teacher | cut from | student |" in card
    assert f"tiny/{first.run_id}" in card and "distilled from `./model`" in card


def check_scores(second: RunInfo, start: Path) -> None:
    """Units are those of the first student, not of the teacher."""
    config = json.loads((start / "config.json").read_bytes())
    rows = second.store.read("importance").to_pylist()
    widths = {row["unit"] for row in rows if row["axis"] == "mlp" and row["layer"] == 0}
    assert len(widths) == config["intermediate_size"] < 96
    layers = {row["layer"] for row in rows if row["axis"] == "mlp"}
    assert layers == set(range(config["num_hidden_layers"]))


def check_signal(first: RunInfo, second: RunInfo) -> None:
    """The teacher ran once for both: the second takes the first's signal, and evaluates to the same loss."""
    signals = [json.loads((info.folder / "stages" / "teacher.json").read_bytes()) for info in (first, second)]
    assert signals[0]["output"] == signals[1]["output"]
    assert "from the cache" in signals[1]["summary"] or "from another run" in signals[1]["summary"]
    losses = [
        row["value"]
        for info in (first, second)
        for row in info.store.read("evaluations").to_pylist()
        if (row["subject"], row["metric"]) == ("teacher", "val_loss")
    ]
    assert len(losses) == 2 and losses[0] == losses[1]
