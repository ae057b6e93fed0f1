"""Following at this terminal a run that goes on elsewhere: of a job, or of a run folder."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path

import click

from minitron_ray.core.errors import EnvironmentFailure, Interrupted, MinitronError, Terminated
from minitron_ray.execution.jobs import DEFAULT_SERVER, Jobs, JobState
from minitron_ray.results.runs import resolve_run

_STOPPED = (Interrupted.exit_code, Terminated.exit_code)
_NO_COMMAND = 127
"""A shell's exit code for a program that is not there."""
_NO_MODULE = re.compile(r"No module named '?minitron_ray\b")
_PATIENCE_S = 60.0
"""Between two words about the same lost connection."""


def watch_command(jobs: Jobs, job: str) -> str:
    """What a user types to follow a job again."""
    server = () if jobs.server == DEFAULT_SERVER else ("--address", jobs.server)
    return shlex.join(["minitron-ray", "watch", job, *server])


def follow(jobs: Jobs, job: str, *, quiet: bool) -> None:
    """Shows a job until it ends, or until Ctrl-C, which leaves it running.

    Raises NotFound for an unknown job, MinitronError when the run failed, Interrupted when it was stopped.
    """
    from minitron_ray.report.watching import events_and_text, show

    known = jobs.state(job).metadata.get("stages", "")
    said_at = float("-inf")

    def lost(why: str) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > _PATIENCE_S:
            said_at = time.monotonic()
            click.echo(f"connection to {jobs.server} lost ({why}); trying again, Ctrl-C detaches", err=True)

    try:
        show(
            events_and_text(jobs.lines(job, lost)),
            stages=[one for one in known.split(",") if one],
            quiet=quiet,
        )
    except KeyboardInterrupt:
        click.echo(
            f"detached, the run goes on; to follow it again: {watch_command(jobs, job)}; "
            f"to stop it: {watch_command(jobs, job)} --stop",
            err=True,
        )
        return
    end_as(jobs.state(job), job)


def end_as(state: JobState, job: str) -> None:
    """Ends this command as the run ended. Raises unless it succeeded."""
    if state.status == "SUCCEEDED":
        return
    if state.status == "STOPPED" or state.exit_code in _STOPPED:
        raise Interrupted(f"job {job} was stopped; submit the same files again to go on")
    if state.exit_code is None:
        reason = next(iter(state.message.strip().splitlines()), "Ray gives no reason")
        raise EnvironmentFailure(f"job {job} could not run: {reason}")
    if state.exit_code == _NO_COMMAND or _NO_MODULE.search(state.message):
        raise EnvironmentFailure(
            f"job {job} found no minitron-ray on the head: install it there, or name the interpreter that has it "
            f"as `python` in the cluster file; then submit again"
        )
    error = MinitronError(f"job {job} failed with exit code {state.exit_code}; what it said stands above")
    error.exit_code = state.exit_code if state.exit_code > 0 else MinitronError.exit_code
    raise error


def follow_run(results: Path, name: str | None, *, quiet: bool) -> None:
    """Shows the run until it ends, or until Ctrl-C, which leaves it running, and then its ranking.

    Raises NotFound for an unknown run, MinitronError for one that failed, Interrupted for one that was
    stopped, or whose driver is gone.
    """
    from rich.console import Console

    from minitron_ray.report.ranking import rank
    from minitron_ray.report.text import render
    from minitron_ray.report.watching import run_events, show

    run = resolve_run(results, name)
    try:
        status = show(run_events(run, time.sleep), stages=run.stages, quiet=quiet)
    except KeyboardInterrupt:
        click.echo(f"detached, run {run.run_id} goes on", err=True)
        return
    if status == "succeeded":
        render(rank(resolve_run(results, f"{run.experiment}/{run.run_id}")), Console(highlight=False))
    elif status == "failed":
        raise MinitronError(f"run {run.run_id} failed; its error stands above and in its events.jsonl")
    elif status == "interrupted":
        raise Interrupted(f"run {run.run_id} was stopped; run its experiment again to go on")
    else:
        raise Interrupted(f"run {run.run_id} has no driver any more; run its experiment again to go on")
