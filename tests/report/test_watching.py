"""A run that another process drives, shown from what it says."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from minitron_ray.core.events import Event
from minitron_ray.report.event_lines import EventLines
from minitron_ray.report.watching import events_and_text, run_events, show
from minitron_ray.results.events import event_of, line_of
from minitron_ray.results.run import Run


def events(run: str, status: str) -> list[Event]:
    return [
        Event(kind="stage_started", fields={"stage": "prepare"}, at=0.0),
        Event(kind="run_started", fields={"experiment": "e", "run_id": run, "folder": "f"}, at=1.0),
        Event(kind="run_finished", fields={"status": status, "seconds": 3.0}, at=3.0),
    ]


def shown(said: list[Event | str]) -> tuple[str | None, str, str]:
    out, err = io.StringIO(), io.StringIO()
    status = show(said, stages=("prepare",), out=out, err=err)
    return status, out.getvalue(), err.getvalue()


def test_two_runs_and_their_rankings() -> None:
    said = [*events("a", "succeeded"), "ranking a", *events("b", "succeeded"), "ranking b"]
    status, out, err = shown(said)
    assert (status, out) == ("succeeded", "ranking a\nranking b\n")
    # A view of its own for each: the second's clock begins anew.
    assert err.count("[0:00:00] prepare: started") == 2 and "run b of e" in err


def test_what_is_printed_amid_a_run_is_shown_only_if_it_fails() -> None:
    first, *rest = events("a", "succeeded")
    assert shown([first, "noise", *rest, "ranking"])[1:2] == ("ranking\n",)
    first, *rest = events("a", "failed")
    status, out, err = shown([first, "noise", *rest, "error: no room"])
    assert (status, out) == ("failed", "") and err.endswith("noise\nerror: no room\n")


def test_a_job_that_says_nothing_but_text_shows_it() -> None:
    assert shown(["error: e.yaml: no such file"]) == (None, "", "error: e.yaml: no such file\n")


def test_lines_of_a_job_are_told_apart() -> None:
    [started, *_] = events("a", "succeeded")
    lines = [
        "2026-01-01 10:00:00,000\tINFO job_manager.py:581 -- Runtime env is setting up.",
        line_of(started),
        "x",
    ]
    lines.insert(1, "Running entrypoint for job job-a: exec python")
    assert list(events_and_text(line.rstrip("\n") for line in lines)) == [started, "x"]


def test_events_as_lines_thin_out_progress_and_nothing_else() -> None:
    stream = io.StringIO()
    tell = EventLines(stream)
    for hundredth in range(250):
        progress = {"stage": "distill", "done": hundredth}
        tell(Event(kind="stage_progress", fields=progress, at=hundredth / 100))
        other = {"candidate_id": f"c{hundredth % 2}", "tokens": hundredth}
        tell(Event(kind="trial_progress", fields=other, at=hundredth / 100))
        tell(Event(kind="note", fields={"text": str(hundredth)}, at=hundredth / 100))
    kinds = [json.loads(line)["kind"] for line in stream.getvalue().splitlines()]
    assert all(event_of(line) is not None for line in stream.getvalue().splitlines())
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "note": 250,
        "stage_progress": 3,  # at 0, 1 and 2 seconds
        "trial_progress": 6,  # for each of two
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path, "e", "0123456789", b"name: e\n", {"seed": 0}, {"versions": {}})


def test_a_run_folder_is_followed_to_its_end(run: Run) -> None:
    from minitron_ray.results.runs import read_info

    to_come = iter(events(run.run_id, "succeeded"))
    run.log_event(next(to_come))
    run.set_status("running")

    def wait(seconds: float) -> None:
        run.log_event(next(to_come))

    followed: Iterator[Event] = run_events(read_info(run.folder), wait)
    assert list(followed) == events(run.run_id, "succeeded")


def test_a_run_whose_driver_is_gone_is_not_waited_for(run: Run) -> None:
    from minitron_ray.results.runs import read_info

    first, second, _ = events(run.run_id, "succeeded")
    for event in (first, second):
        run.log_event(event)
    run.set_status("interrupted")
    # From its run_started on: what a driver says before stands in another attempt's place.
    assert list(run_events(read_info(run.folder), pytest.fail)) == [second]
