"""The ranking: figures from the tables, in the right order, also while a run is not finished."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.report.listing import summarise
from minitron_ray.report.ranking import Entry, budget_distance, rank
from minitron_ray.report.text import sentences
from minitron_ray.results.files import finite
from minitron_ray.results.run import Run
from minitron_ray.results.runs import RunInfo, read_info


def entries(run: Run) -> dict[str, Entry]:
    return {entry.subject[0]: entry for entry in rank(read_info(run.folder)).entries}


def test_teacher_first_then_distilled_completed_stopped_failed(info: RunInfo) -> None:
    ranking = rank(info)
    assert [(entry.subject[0], entry.rank, entry.status) for entry in ranking.entries] == [
        ("t", None, "teacher"),
        ("a", 1, "distilled"),
        ("b", 2, "completed"),
        ("c", None, "stopped"),  # its loss, the lowest of all, is of fewer tokens
        ("d", None, "failed"),
    ]
    assert ranking.missing == () and ranking.status == "succeeded"
    assert ranking.budget == "95.0M to 105.0M parameters"


def test_the_figures_of_the_winner(make_run: Any) -> None:
    found = entries(make_run())
    best, teacher = found["a"], found["t"]
    assert (best.cut_loss, best.search_loss, best.final_loss) == (4.25, 3.7, 3.6)
    assert best.perplexity == pytest.approx(math.exp(3.6))
    assert best.recovery == pytest.approx(math.exp(3.35 - 3.6))
    assert (best.shape, best.parameters, best.budget_distance) == ("24L 576H 9h/3 1024m", 98_000_000, -0.02)
    assert best.tokens == 65_536
    assert best.seconds == 40.0 + 4 * 1024 / 128
    assert best.export == "exports/aaaaaaaaaa"
    assert (teacher.shape, teacher.parameters) == ("30L 576H 9h/3 1536m", 134_515_008)
    assert (teacher.final_loss, teacher.recovery) == (3.35, 1.0)


def test_students_that_only_searched(make_run: Any) -> None:
    found = entries(make_run())
    second, failed = found["b"], found["d"]
    assert (second.cut_loss, second.search_loss, second.final_loss, second.tokens) == (4.2, 3.8, None, 8192)
    assert second.perplexity == pytest.approx(math.exp(3.8)) and second.budget_distance == 0.03
    assert (failed.search_loss, failed.reason) == (None, "loss became NaN\nat step 3")


@pytest.mark.parametrize(
    ("until", "missing"),
    [
        (
            "importance",
            ["the teacher's signal", "the search", "the distillation", "teacher and", "no stud"],
        ),
        ("search", ["the distillation has not finished", "teacher and students are not", "no student"]),
        ("distill", ["teacher and students are not evaluated", "no student is exported"]),
        ("evaluate", ["no student is exported"]),
    ],
)
def test_an_unfinished_run_says_what_is_missing(make_run: Any, until: str, missing: list[str]) -> None:
    ranking = rank(read_info(make_run(until).folder))
    assert len(ranking.missing) == len(missing)
    assert all(said.startswith(start) for said, start in zip(ranking.missing, missing, strict=True))
    assert ranking.status == "interrupted"
    assert ranking.entries[0].subject == "teacher"


def test_a_run_in_the_middle_of_its_distillation(make_run: Any) -> None:
    run = make_run("distill")
    (run.folder / "stages" / "distill.json").unlink()
    ranking = rank(read_info(run.folder))
    assert ranking.missing[0] == "the distillation has not finished: aaaaaaaaaa at 4,096 of 65,536 tokens"
    best = ranking.entries[1]
    assert (best.rank, best.status, best.final_loss, best.recovery) == (1, "distilling", None, None)
    assert best.cut_loss == 4.3, "the search's own measurement of the cut"


def test_a_run_in_the_middle_of_its_search(make_run: Any) -> None:
    run = make_run("search")
    (run.folder / "stages" / "search.json").unlink()
    run.store.append(
        "trials", [{"candidate_id": "e", "rung": 0, "status": "running"}], writer="e", sequence=0
    )
    ranking = rank(read_info(run.folder))
    assert ranking.missing[0] == "the search has not finished: 4 of at most 8 trials ended"
    assert [entry.status for entry in ranking.entries[-2:]] == ["running", "failed"]
    # What is still tried may be better: nothing is ranked, and nothing called the best.
    assert {entry.rank for entry in ranking.entries} == {None}
    assert not any(line.startswith("best") for line in sentences(ranking))
    assert summarise(read_info(run.folder)).best_loss is None


def test_a_run_that_has_only_begun(results: Path) -> None:
    run = Run.open(results, "exp", "cd" * 32, b"", {}, {})
    ranking = rank(read_info(run.folder))
    assert len(ranking.entries) == 1 and len(ranking.missing) == 10 and ranking.budget is None


def test_a_trial_run_again_after_a_failure_keeps_its_success(make_run: Any) -> None:
    run = make_run("search")
    again = {"candidate_id": "dddddddddd", "rung": 2, "val_loss": 3.75, "tokens": 8192, "status": "completed"}
    run.store.append("trials", [again], writer="retry", sequence=0)
    entry = entries(run)["d"]
    assert (entry.status, entry.rank, entry.reason, entry.search_loss) == ("completed", 2, None, 3.75)


def test_rungs_of_a_failed_attempt_are_not_those_of_the_next(make_run: Any) -> None:
    run = make_run("search")
    rows = [(1, 3.9, "stopped"), (2, 3.1, "failed")]
    for number, loss, status in rows:
        row = {"candidate_id": "aaaaaaaaaa", "rung": number, "val_loss": loss, "status": status, "tokens": 1}
        run.store.append("trials", [row], writer="aaaaaaaaaa", sequence=number)
    entry = entries(run)["a"]
    assert (entry.status, entry.search_loss, entry.reason) == ("stopped", 3.9, None)


def test_a_loss_that_is_nan_ranks_last_among_its_kind(make_run: Any) -> None:
    run = make_run("search")
    row = {"candidate_id": "aaaaaaaaaa", "rung": 3, "val_loss": math.nan, "tokens": 1, "status": "completed"}
    run.store.append("trials", [row], writer="more", sequence=0)
    ranking = rank(read_info(run.folder))
    assert [entry.subject[0] for entry in ranking.entries] == ["t", "b", "a", "c", "d"]
    assert ranking.entries[2].perplexity is None
    assert (
        json.loads(json.dumps(finite(ranking.as_json()), allow_nan=False))["entries"][2]["search_loss"]
        is None
    )


def test_the_budget_may_leave_out_embeddings(make_run: Any) -> None:
    budget = {"parameters": 70_000_000, "tolerance": 0.1, "count": "non_embedding"}
    run = make_run("search", resolved={"budget": budget})
    entry = entries(run)["a"]
    assert entry.budget_distance == pytest.approx((98_000_000 - 28_311_552 - 70_000_000) / 70_000_000)
    assert rank(read_info(run.folder)).budget == "63.0M to 77.0M non-embedding parameters"


@pytest.mark.parametrize(
    ("parameters", "target", "distance"),
    [
        (110, 100, 0.1),
        (90, 100, -0.1),
        (150, "100..200", 0.0),
        (90, "100..200", -0.1),
        (220, "100..200", 0.1),
        (90, "<= 100", 0.0),
        (90, "100 ± 50%", -0.1),
    ],
)
def test_distance_to_a_centre_or_a_range(parameters: int, target: Any, distance: float) -> None:
    assert budget_distance(parameters, {"parameters": target}) == pytest.approx(distance)
    assert budget_distance(None, {"parameters": target}) is None and budget_distance(parameters, None) is None
    assert budget_distance(parameters, {"memory": "<= 22GiB"}) is None


def test_a_run_is_judged_by_the_stages_it_has(results: Path) -> None:
    stages = ("prepare", "importance", "teacher", "evaluate", "export")
    run = Run.open(results, "fixed", "ef" * 32, b"", {"shape": {"layers": 3}}, {}, stages)
    assert len(rank(read_info(run.folder)).missing) == 5
    sizes = {"layers": 3, "hidden": 48, "heads": 3, "kv_heads": 3, "mlp": 64, "parameters": 54_096}
    row = sizes | {"candidate_id": "a" * 10, "in_budget": True}
    run.store.append("candidates", [row], writer="space", sequence=0)
    losses = [("teacher", "teacher", 3.0), ("a" * 10, "cut", 4.0)]
    rows = [{"subject": s, "phase": p, "metric": "val_loss", "value": v} for s, p, v in losses]
    run.store.append("evaluations", rows, writer="evaluate", sequence=0)
    for stage in stages:
        run.finish_stage(stage, stage, {}, "", 0.0)
    ranking = rank(read_info(run.folder))
    assert ranking.missing == () and ranking.budget is None and ranking.stages == stages
    student = ranking.entries[1]
    assert (student.status, student.rank, student.loss, student.shape) == ("cut", 1, 4.0, "3L 48H 3h 64m")
    assert student.recovery == pytest.approx(math.exp(3.0 - 4.0)) and student.budget_distance is None
    assert ranking.as_json()["stages"] == list(stages)
