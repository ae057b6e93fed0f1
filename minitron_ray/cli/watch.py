"""`minitron-ray watch`: follow a run that another terminal, or a cluster, drives."""

from __future__ import annotations

from pathlib import Path

import click

from minitron_ray.cli.options import cluster_option, quiet_option, results_option
from minitron_ray.cli.submit import server_option

_JOB_NAMES = ("job-", "raysubmit_")


@click.command()
@click.argument("run", required=False)
@results_option
@server_option
@cluster_option
@click.option(
    "--stop", is_flag=True, help="Ask a submitted run to stop at its next safe point, and follow it."
)
@quiet_option
def watch(
    run: str | None,
    results: Path,
    address: str | None,
    cluster_file: Path | None,
    stop: bool,
    quiet: bool,
) -> None:
    """Follow RUN until it ends: a run of the results folder (as for `report`), or a submitted job (job-...).

    A name that both have is that of the run; with --address, --cluster or --stop it is that of the job.
    Ctrl-C ends the following, not the run. The exit code is 0 where the run succeeded, 1 where it failed (a
    job's own code), 130 where it was stopped.
    """
    from minitron_ray.cli.attached import follow, follow_run
    from minitron_ray.cli.launch import cluster_settings
    from minitron_ray.execution.jobs import Jobs, job_server
    from minitron_ray.results.runs import names_run

    options = {"--address": address, "--cluster": cluster_file, "--stop": stop}
    given = [option for option, value in options.items() if value]
    of_a_job = run is not None and run.startswith(_JOB_NAMES)
    if run is None or not of_a_job or (not given and names_run(results, run)):
        if given:
            raise click.UsageError(f"{given[0]} is for a submitted run: name its job (job-...)")
        follow_run(results, run, quiet=quiet)
        return
    jobs = Jobs(job_server(cluster_settings(cluster_file, None), address))
    if stop:
        jobs.stop(run)
    follow(jobs, run, quiet=quiet)
