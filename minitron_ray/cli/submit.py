"""`minitron-ray submit`: hand a run over to a cluster, where closing this terminal does not stop it."""

from __future__ import annotations

from pathlib import Path

import click

from minitron_ray.cli.options import cluster_option, experiments_argument, quiet_option, set_option

server_option = click.option(
    "--address",
    help="http://host:port of the cluster's job server (default: `jobs` of the cluster file, else "
    "RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265).",
)
"""`address: str | None`, of a job server. Others take the address that nodes join."""


@click.command()
@experiments_argument
@click.option(
    "--results", required=True, metavar="FOLDER", help="Folder of all runs, as the cluster's nodes see it."
)
@set_option
@server_option
@cluster_option
@click.option(
    "--working-dir",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder that is copied to the cluster (default: that of the EXPERIMENT files).",
)
@click.option("--detach", is_flag=True, help="Do not follow the run.")
@click.option(
    "--rehearse", is_flag=True, help="First find out there what would fail, with small models (see `run`)."
)
@quiet_option
def submit(
    experiments: tuple[Path, ...],
    results: str,
    overrides: tuple[str, ...],
    address: str | None,
    cluster_file: Path | None,
    working_dir: Path | None,
    detach: bool,
    rehearse: bool,
    quiet: bool,
) -> None:
    """Run each EXPERIMENT on a cluster as a Ray job, and follow it here.

    The folder of the EXPERIMENT files is copied to the cluster. Ctrl-C or a closed terminal ends the
    following, not the run; `minitron-ray watch JOB` follows it again. Submitting the same files again
    after a failure goes on where the run was.
    """
    from minitron_ray.cli.attached import follow, watch_command
    from minitron_ray.cli.chain import in_order
    from minitron_ray.cli.handover import hand_over
    from minitron_ray.cli.launch import cluster_settings, read_experiments
    from minitron_ray.execution.jobs import Jobs, job_server

    settings = cluster_settings(cluster_file, None)
    loaded = read_experiments(experiments, overrides)
    in_order([one.experiment for one in loaded], lambda experiment: experiment)
    jobs = Jobs(job_server(settings, address))
    job, uploaded = hand_over(
        jobs,
        experiments,
        [one.experiment for one in loaded],
        python=settings.python,
        cluster_file=cluster_file,
        results=results,
        overrides=overrides,
        working_dir=working_dir,
        rehearse=rehearse,
    )
    click.echo(f"submitted {job}, with {uploaded}; to follow it again: {watch_command(jobs, job)}", err=True)
    if not detach:
        follow(jobs, job, quiet=quiet)
