"""One experiment from YAML to ranked students; the same after interruptions of every kind."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.report.plan_actual import plan_against_actual
from minitron_ray.results.runs import read_info
from minitron_ray.results.store import Store
from tests.end_to_end.desk import Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEYS = {
    "trials": ("candidate_id", "rung"),
    "steps": ("candidate_id", "step"),
    "candidates": ("candidate_id",),
    "importance": ("axis", "layer", "unit"),
    "evaluations": ("subject", "phase", "metric"),
    "sequence_losses": ("subject", "phase", "tokens", "sequence"),
    "exports": ("candidate_id",),
}
"""What identifies a row."""

FIGURES = {
    "trials": ("val_loss", "val_divergence", "train_loss", "tokens", "final", "status"),
    "steps": ("loss", "gradient_norm", "learning_rate", "val_loss", "tokens"),
    "importance": ("score",),
    "evaluations": ("value", "stderr"),
    "sequence_losses": ("loss",),
    "exports": ("parameters", "weights_digest"),
}
"""What must not depend on interruptions: everything but the clock."""


def contents(desk: Desk) -> dict[str, dict[Any, Any]]:
    found: dict[str, dict[Any, Any]] = {}
    for table, key in KEYS.items():
        rows = desk.rows(table)
        names = Counter(tuple(row[name] for name in key) for row in rows)
        assert names and max(names.values()) == 1, f"{table}: {names.most_common(1)} is there more than once"
        figures = FIGURES.get(table, ())
        found[table] = {tuple(r[n] for n in key): tuple(r[n] for n in figures) for r in rows}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path) -> Desk:
    """A run that nothing interrupted."""
    desk = Desk.lay(tmp_path_factory.mktemp("whole"), tiny_llama, tiny_text)
    out, err = desk.run()
    assert "4L 48H" in out and "exported" in out
    assert "Traceback" not in err and "Warning" not in err
    return desk


def test_tables_hold_every_stage(whole: Desk) -> None:
    found = contents(whole)
    assert len(found["candidates"]) == 16
    feasible = {row["candidate_id"] for row in whole.rows("candidates") if row["in_budget"]}
    trials = whole.rows("trials")
    assert {row["candidate_id"] for row in trials} == feasible and len(feasible) == 7
    assert all(row["reason"] for row in whole.rows("candidates") if not row["in_budget"])
    assert {row["tokens"] for row in trials} == {0, 512, 1024, 2048}
    assert {row["status"] for row in trials if row["final"]} == {"completed"}
    assert sorted(row["step"] for row in whole.rows("steps")) == list(range(1, 251))
    assert {row["workers"] for row in whole.rows("steps")} == {1}
    statuses = [row["status"] for row in whole.rows("runs")]
    assert statuses[0] == "running" and statuses[-1] == "succeeded"
    columns = {name for row in whole.rows("evaluations") for name, value in row.items() if value is None}
    assert columns <= {"stderr"}


def test_the_plan_is_kept_and_was_right(whole: Desk) -> None:
    planned = {row["stage"]: row["tokens"] for row in whole.rows("costs")}
    assert list(planned)[:2] == ["importance", "teacher"] and list(planned)[-2:] == ["evaluate", "export"]
    assert planned["search"] == sum(row["tokens"] for row in whole.rows("trials") if row["final"])
    assert planned["distill"] == max(row["tokens"] for row in whole.rows("steps"))
    actual = {row.stage: row for row in plan_against_actual(read_info(whole.run_folder()))}
    # 8 sequences of 32 tokens are scored, and as many are seen by the teacher and by the student.
    assert (actual["importance"].tokens, actual["evaluate"].tokens) == (8 * 32, 2 * 8 * 32)
    assert all(row.tokens == planned[name] for name, row in actual.items() if planned[name])
    kept = actual["search"]
    assert kept.disk and kept.planned_disk and kept.disk <= kept.planned_disk, (
        "states of trials at their rungs"
    )
    signal_files = (whole.results / ".cache").rglob("*.bin")
    assert actual["teacher"].disk == sum(path.stat().st_size for path in signal_files) > 0


def test_no_stage_tells_of_more_than_there_is_to_do(whole: Desk) -> None:
    """Also where several workers each do a part, and what they tell is added up."""
    lines = (whole.run_folder() / "events.jsonl").read_text().splitlines()
    told = [event for event in map(json.loads, lines) if event["kind"] == "stage_progress"]
    assert "distill" in {event["stage"] for event in told}, "what a short stage tells may come too late"
    assert all(event["total"] is None or event["done"] <= event["total"] for event in told)


def test_the_best_trial_goes_on_and_learns(whole: Desk) -> None:
    last = [row for row in whole.rows("trials") if row["final"]]
    best = min(last, key=lambda row: row["val_loss"])["candidate_id"]
    divergence = {
        r["phase"]: r["value"] for r in whole.rows("evaluations") if r["metric"] == "val_divergence"
    }
    assert {r["subject"] for r in whole.rows("evaluations")} == {"teacher", best}
    assert divergence["teacher"] == pytest.approx(0, abs=1e-5)
    assert divergence["distilled"] < 0.8 * divergence["cut"]
    one = next(row for row in whole.rows("trials") if row["candidate_id"] == best and row["rung"] == 0)
    assert divergence["cut"] == one["val_divergence"]


def test_the_export_is_a_stock_model_that_writes_text(whole: Desk) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (row,) = whole.rows("exports")
    folder = whole.run_folder() / row["path"]
    assert row["max_logit_difference"] == 0.0
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == row["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The guide", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert written.shape[1] > ids.shape[1]
    assert "perplexity" in (folder / "README.md").read_text()
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.py"))


def test_a_second_run_reuses_everything_without_starting_ray(whole: Desk) -> None:
    before, started = contents(whole), time.monotonic()
    out, err = whole.run()
    assert time.monotonic() - started < 20
    for stage in ("importance", "teacher", "search", "distill", "evaluate", "export"):
        assert f"{stage}: reused" in err
    assert contents(whole) == before
    assert (
        json.loads(whole.call("report", whole.run_folder().name, "--json")[0])["run_id"]
        == whole.run_folder().name
    )
    assert "tiny" in whole.call("runs")[0]
    rows = json.loads(
        whole.call("query", "select * from trials order by val_loss limit 5", "--format", "json")[0]
    )
    assert len(rows) == 5 and rows[0]["val_loss"] <= rows[4]["val_loss"]
    assert out


def test_another_distillation_takes_the_search_over(whole: Desk) -> None:
    before = contents(whole)
    _, err = whole.run("--set", "distill.tokens=2k")
    for stage in ("importance", "search"):
        assert f"{stage}: reused" in err and "(from another run)" in err
    assert "distill: finished" in err
    assert contents(whole) == before
    one, other = (Store(folder, "tiny", folder.name) for folder in sorted(whole.results.glob("tiny/2*")))
    for table in ("importance", "trials", "candidates"):
        rows, copies = one.read(table).to_pylist(), other.read(table).to_pylist()
        assert {row.pop("run_id") for row in copies} == {other.run_id}
        assert [row | {"run_id": ""} for row in copies] == [row | {"run_id": ""} for row in rows]
    mine, taken = (plan_against_actual(read_info(store.folder)) for store in (one, other))
    first, second = ({row.stage: row for row in rows} for rows in (mine, taken))
    assert first["teacher"].tokens == 8 * 32 + 2048 and first["teacher"].reached
    assert (second["teacher"].status, second["teacher"].tokens) == ("finished", 0)
    assert (second["search"].status, second["search"].tokens) == ("taken_over", None)
    assert first["search"].reached and second["search"].reached is None and second["teacher"].reached is None


def test_an_edited_text_is_another_run(desk: Desk, whole: Desk) -> None:
    shutil.copytree(whole.results, desk.results)
    _, err = desk.run()
    assert err.count(": reused") == 6  # the same model and text, in another place
    path = next((desk.folder / "text").rglob("*.txt"))
    path.write_text(path.read_text().upper())
    scored = lambda: set(desk.results.glob("tiny/*/stages/importance.json"))  # noqa: E731
    before = scored()
    code, err = desk.stop_when(lambda: scored() > before, signal.SIGTERM)
    assert code == 143
    assert "reused" not in err and "taken over" not in err


@pytest.mark.timeout(900)
def test_stops_lose_and_double_nothing(desk: Desk, whole: Desk) -> None:
    """A stop, in the search by Ctrl-C and in the distillation by SIGTERM, comes at a safe point and says how to go
    on. (kill -9 of the driver is `test_search_killed`'s in a search and `test_fault_drill`'s in a distillation.)"""
    endings = (
        ("trials", 3, signal.SIGINT, 130),
        ("steps", 1, signal.SIGTERM, 143),
    )
    for table, new, number, exit_code in endings:
        fragments = partial(desk.results.glob, f"tiny/*/tables/{table}/*.arrow")
        least = len(list(fragments())) + new
        seen = lambda fragments=fragments, least=least: len(list(fragments())) >= least  # noqa: E731
        code, err = desk.stop_when(seen, number)
        assert code == exit_code
        last = "search" if table == "trials" else "distill"
        assert not list(desk.results.glob(f"tiny/*/stages/{last}.json")), "ended too late to prove anything"
        assert "stopping at the next safe point" in err and "run it again" in err
        assert "Traceback" not in err and desk.rows("runs")[-1]["status"] == "interrupted"
    desk.run()
    assert contents(desk) == contents(whole)
