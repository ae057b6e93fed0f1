"""Plan against actual: figures put together from tables that are easy to add up by hand."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from minitron_ray.report.plan_actual import HEADER, actual_section, cells, plan_against_actual
from minitron_ray.report.sections import markdown_table, show
from minitron_ray.results.run import Run
from minitron_ray.results.runs import read_info
from tests.report.conftest import MakeRun
from tests.report.conftest import search as search_tables

COST = {"what": "", "tokens": 1000, "flops": 4e9, "device_seconds": 2.0, "devices": 2}


def planned(run: Run, **stages: dict[str, Any]) -> None:
    rows = [
        COST | {"stage": stage, "memory_bytes": 1, "disk_bytes": 0} | more for stage, more in stages.items()
    ]
    run.store.append("costs", rows, writer="plan", sequence=0)


def attempt(run: Run, stage: str, status: str, seconds: float) -> None:
    run.note_stage(stage, "f", status, "", seconds)


def test_a_run_without_a_plan_has_no_rows(make_run: MakeRun) -> None:
    assert plan_against_actual(read_info(make_run().folder)) == ()


def test_seconds_of_all_attempts_on_all_devices(make_run: MakeRun) -> None:
    run = make_run("prepare")
    planned(run, importance={})
    attempt(run, "importance", "interrupted", 1.5)
    [row] = plan_against_actual(read_info(run.folder))
    assert (row.status, row.seconds, row.reached) == ("interrupted", 3.0, None), (
        "how far it came is not known"
    )
    run.begin_stage("importance", "f")
    run.finish_stage("importance", "f", {}, "", 2.5)
    attempt(run, "importance", "reused", 0.0)
    [row] = plan_against_actual(read_info(run.folder))
    assert (row.status, row.seconds, row.planned_seconds) == ("reused", 8.0, 2.0)
    assert row.reached == 4e9 / 8.0


def test_a_stage_of_another_run_took_no_time(make_run: MakeRun) -> None:
    """Its rows are here, its 700 seconds there."""
    run = make_run("search")
    run.finish_stage("search", "s", {}, "", 700.0, taken_over=True)
    planned(run, search={}, evaluate={})
    search, evaluate = plan_against_actual(read_info(run.folder))
    assert (search.status, search.tokens, search.seconds, search.reached) == ("taken_over", None, None, None)
    assert (evaluate.status, evaluate.seconds) == (None, None)
    assert next(cells([search]))[3] == "reused"
    attempt(run, "search", "reused", 0.0)
    search, _ = plan_against_actual(read_info(run.folder))
    assert (search.status, search.seconds, search.reached) == ("reused", None, None)


@pytest.mark.parametrize(
    ("done", "tokens", "reached"),
    [
        ([("finished", 2.0, 1000)], 1000, 4e9 / 4.0),
        ([("finished", 2.0, 250)], 250, 1e9 / 4.0),  # the rest was in the cache
        ([("interrupted", 1.0, 600), ("finished", 1.0, 400)], 1000, 4e9 / 4.0),
        ([("finished", 0.001, 0)], 0, None),  # all of it was
        ([("finished", 0.001, None)], None, None),  # of a run that did not say
    ],
)
def test_a_teacher_is_as_fast_as_what_it_computed(
    make_run: MakeRun, done: list[tuple[str, float, int | None]], tokens: int | None, reached: float | None
) -> None:
    run = make_run("prepare")
    planned(run, teacher={})
    for status, seconds, computed in done:
        run.note_stage("teacher", "f", status, "", seconds, tokens=computed)
    [row] = plan_against_actual(read_info(run.folder))
    assert (row.tokens, row.reached) == (tokens, reached)


def test_an_attempt_that_was_killed_hides_how_fast_it_was(make_run: MakeRun) -> None:
    """It says no seconds, but its tokens are in the tables."""
    run = make_run("teacher")
    planned(run, search={"tokens": 32768})
    run.begin_stage("search", "f")
    search_tables(run)
    again = Run(run.folder)
    again.begin_stage("search", "f")
    assert [row.status for row in plan_against_actual(read_info(run.folder))] == ["running"]
    again.finish_stage("search", "f", {}, "", 3.0)
    [row] = plan_against_actual(read_info(run.folder))
    assert (row.status, row.tokens, row.seconds, row.reached) == ("finished", 24576, 6.0, None)


def test_tokens_are_those_of_the_tables(make_run: MakeRun) -> None:
    """Four trials of 4096 or 8192 tokens (one failed at its first rung), a baseline and another that is a
    copy of a trial, four steps of 1024."""
    run = make_run()
    planned(run, search={"tokens": 32768}, baselines={}, distill={"devices": None, "device_seconds": None})
    baseline = {"candidate_id": "cccccccccc", "rung": 3, "tokens": 12288, "origin": "scratch"}
    run.store.append("trials", [baseline], writer="scratch", sequence=0)
    copy = baseline | {"candidate_id": "aaaaaaaaaa", "origin": "random", "copied": True}
    run.store.append("trials", [copy], writer="random", sequence=0)
    for stage in ("search", "baselines", "distill"):
        attempt(run, stage, "finished", 10.0)
    search, baselines, distill = plan_against_actual(read_info(run.folder))
    assert search.tokens == 8192 + 8192 + 4096 + 4096
    assert baselines.tokens == 12288
    assert distill.tokens == 4096
    assert distill.planned_seconds is None
    # The planned operations, as far as the tokens went, over the seconds of both devices.
    assert search.reached is not None and search.seconds is not None
    assert search.reached == 4e9 * (24576 / 32768) / search.seconds


def test_ties_are_as_planned(make_run: MakeRun) -> None:
    """24576 tokens are seen where 16384 were planned, and up to 16384 more for ties."""
    run = make_run("teacher")
    planned(run, search={"tokens": 16384, "tie_tokens": 16384}, distill={})
    run.begin_stage("search", "f")
    search_tables(run)
    run.finish_stage("search", "f", {}, "", 3.0)
    search, distill = plan_against_actual(read_info(run.folder))
    assert search.planned_tokens < (search.tokens or 0) <= search.planned_tokens + search.planned_ties
    assert search.reached == 4e9 * (24576 / 16384) / 6.0, "ties are work, too"
    assert [row[1:3] for row in cells([search, distill])] == [("24.6K", "≤32.8K"), ("-", "1.0K")]


def test_files_are_counted(make_run: MakeRun) -> None:
    run = make_run("distill")
    planned(run, distill={"disk_bytes": 5000}, export={})
    folder = run.folder / "checkpoints" / "aaaaaaaaaa" / "final"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 3000)
    attempt(run, "distill", "finished", 1.0)
    distill, export = plan_against_actual(read_info(run.folder))
    assert (distill.disk, distill.planned_disk) == (3000, 5000)
    assert export.disk is None


def test_files_that_are_gone_are_counted_as_they_were_seen(make_run: MakeRun) -> None:
    """The largest of what attempts saw and of what is there."""
    run = make_run("teacher")
    planned(run, search={"disk_bytes": 5000}, baselines={})
    run.note_stage("search", "f", "interrupted", "", 1.0, disk=4000)
    folder = run.folder / "trials" / "aaaaaaaaaa"
    folder.mkdir(parents=True)
    (folder / "rung.pt").write_bytes(b"x" * 4500)
    assert plan_against_actual(read_info(run.folder))[0].disk == 4500
    (folder / "rung.pt").unlink()
    run.note_stage("search", "f", "finished", "", 1.0, disk=3000)
    search, baselines = plan_against_actual(read_info(run.folder))
    assert (search.disk, search.planned_disk, baselines.disk) == (4000, 5000, None)


def test_it_is_shown_in_80_columns_and_as_markdown(make_run: MakeRun) -> None:
    run = make_run()
    tokens = {"tokens": 27_037_532_160, "tie_tokens": 100_037_532_160}
    planned(run, search={**tokens, "device_seconds": 3.1e6, "disk_bytes": 2**41}, export={})
    rows = plan_against_actual(read_info(run.folder))
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as shown:
        show(actual_section(rows), console)
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in shown.get()
    assert sum(set(line) == {"─"} for line in lines) == 1, "one table"
    assert "861 h" in shown.get() and "≤127.1B" in shown.get()
    page = markdown_table(actual_section(rows))
    assert len(page) == 2 + len(rows) and all(line.count("|") == len(HEADER) + 1 for line in page)
