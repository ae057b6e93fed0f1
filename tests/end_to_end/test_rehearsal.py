"""`run --rehearse`: every stage in miniature, and nothing that could be taken for a result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_ray.results.runs import REHEARSED, find_runs
from tests.end_to_end.desk import EXPERIMENT, Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FIRST = EXPERIMENT.replace("text/**/*.txt", "corpus/**/*.parquet").replace("tokens: 32k", "tokens: 1T")
SECOND = """
name: tinier
precision: float32
teacher: {path: ./model}
start: {experiment: tiny}
data: {source: {kind: files, path: "text/**/*.txt"}, sequence_length: 32}
shape: {layers: 2}
"""


def test_a_chain_is_gone_through_and_leaves_no_result(desk: Desk) -> None:
    """The first file's text is missing; its real run would take a trillion tokens."""
    (desk.folder / "tiny.yaml").write_text(FIRST)
    (desk.folder / "tinier.yaml").write_text(SECOND)
    out, err = desk.call("run", "--rehearse", "tinier.yaml", "tiny.yaml", "--json", expect=2)
    assert f"error: the real run can't begin: data.source: no file fits {desk.folder}" in err
    first, second = json.loads(out)
    assert [one["experiment"] for one in (first, second)] == ["tiny", "tinier"]
    assert [problem[:40] for problem in first["problems"]] == [
        "data.source: no file fits " + str(desk.folder)[:14]
    ]
    assert second["problems"] == [] and REHEARSED in err
    assert set(first["stages"]) >= {"importance", "search", "distill", "evaluate", "export"}
    assert not find_runs(desk.results) and not list(desk.results.glob("tiny*"))

    there = desk.results / ".rehearsal"
    runs = {info.experiment: info for info in find_runs(there)}
    assert all(info.rehearsal and info.status == "succeeded" for info in runs.values())
    assert "a recovery is rehearsed: stopped at step" in (runs["tiny"].folder / "events.jsonl").read_text()
    steps = [row["step"] for row in runs["tiny"].store.read("steps").to_pylist()]
    assert sorted(steps) == list(range(1, max(steps) + 1)), "each once, of both groups"
    start = json.loads((runs["tinier"].folder / "stages" / "prepare.json").read_bytes())["output"]["start"]
    assert start.startswith(f"tiny/{first['run_id']}, ")
    [card] = Path(second["folder"]).glob("exports/*/README.md")
    assert REHEARSED in card.read_text()
    out, _ = desk.call("report", "tiny", "--results", str(there), "--json")
    report = json.loads(out)
    assert report["rehearsal"] and all(entry["rank"] is None for entry in report["entries"])
    out, _ = desk.call("runs", "--results", str(there), "--json")
    assert all(line["rehearsal"] and line["best_loss"] is None for line in json.loads(out))

    for folder in (desk.results, there):  # not even where it lies is it started from
        _, err = desk.call("run", "tinier.yaml", "--results", str(folder), expect=2)
        assert "there is no run of tiny in" in err


def test_without_anything_known_of_the_model_there_is_no_rehearsal(desk: Desk) -> None:
    (desk.folder / "tiny.yaml").write_text(EXPERIMENT.replace("./model", "./gone"))
    _, err = desk.run("--rehearse", expect=2)
    assert "no such folder" in err and "give teacher.config" in err
