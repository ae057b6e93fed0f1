"""`report`, `runs` and `query` as commands: what goes to stdout, to stderr, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from minitron_ray.cli import main
from minitron_ray.results.runs import RunInfo


def call(results: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--results", str(results)], catch_exceptions=False)


def test_report_of_the_newest_run(info: RunInfo, results: Path) -> None:
    for arguments in ((), ("quickstart",), (info.run_id,), (info.run_id[:-2],)):
        shown = call(results, "report", *arguments)
        assert shown.exit_code == 0 and shown.stderr == ""
        assert f"quickstart  run {info.run_id}  succeeded" in shown.stdout
        assert "24L 576H 9h/3 1024m" in shown.stdout


def test_report_as_json(info: RunInfo, results: Path) -> None:
    ranking = json.loads(call(results, "report", "--json").stdout)
    assert [entry["status"] for entry in ranking["entries"]] == [
        "teacher", "distilled", "completed", "stopped", "failed",
    ]  # fmt: skip
    assert ranking["entries"][1]["parameters"] == 98_000_000 and ranking["run_id"] == info.run_id


def test_report_as_markdown(info: RunInfo, results: Path) -> None:
    shown = call(results, "report", "--md").stdout
    assert shown.startswith(f"## quickstart, run {info.run_id} (succeeded)\n") and shown.endswith("\n")
    both = call(results, "report", "--md", "--json")
    assert both.exit_code == 2 and "--json and --md exclude each other" in both.stderr


@pytest.mark.parametrize("arguments", [("report",), ("report", "quickstrat")])
def test_report_of_nothing_is_not_found(results: Path, arguments: tuple[str, ...]) -> None:
    shown = call(results, *arguments)
    assert shown.exit_code == 4 and shown.stdout == "" and "no runs in" in shown.stderr


def test_report_of_a_near_miss(info: RunInfo, results: Path) -> None:
    shown = call(results, "report", "quickstrat")
    assert shown.exit_code == 4 and "did you mean quickstart?" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_runs(info: RunInfo, results: Path) -> None:
    shown = call(results, "runs")
    assert shown.exit_code == 0 and info.run_id in shown.stdout and "7/7" in shown.stdout
    listed = json.loads(call(results, "runs", "--json").stdout)
    assert [(run["run_id"], run["status"], run["best_loss"]) for run in listed] == [
        (info.run_id, "succeeded", 3.6)
    ]


def test_no_runs_yet(results: Path) -> None:
    shown = call(results, "runs")
    assert shown.exit_code == 0 and shown.stdout == "" and "no runs in" in shown.stderr
    assert json.loads(call(results, "runs", "--json").stdout) == []


def test_query(info: RunInfo, results: Path) -> None:
    sql = "select candidate_id, val_loss from trials where final order by val_loss limit 5"
    shown = call(results, "query", sql, "--format", "jsonl")
    assert shown.exit_code == 0 and shown.stderr == ""
    assert [json.loads(line)["val_loss"] for line in shown.stdout.splitlines()] == [3.1, 3.7, 3.8]
    assert "(3 rows)" in call(results, "query", sql).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("select * from trails",), "query: no table 'trails'; did you mean 'trials'"),
        (("select 1", "--format", "xml"), "'xml' is not one of table, csv, json, jsonl, arrow, parquet"),
    ],
)
def test_query_mistakes_end_with_two(results: Path, arguments: tuple[str, ...], message: str) -> None:
    shown = call(results, "query", *arguments)
    assert shown.exit_code == 2 and message in shown.stderr and shown.stdout == ""
