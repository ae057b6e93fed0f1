"""`minitron-ray run`: do it, live; run again to go on."""

from __future__ import annotations

from pathlib import Path

import click

from minitron_ray.cli.options import (
    address_option,
    cluster_option,
    events_option,
    experiments_argument,
    json_option,
    quiet_option,
    results_option,
    set_option,
)


@click.command()
@experiments_argument
@results_option
@set_option
@address_option
@cluster_option
@quiet_option
@events_option
@json_option
@click.option(
    "--rehearse",
    is_flag=True,
    help="Go through every stage on this cluster in minutes, with random weights and a little of the text.",
)
def run(
    experiments: tuple[Path, ...],
    results: Path,
    overrides: tuple[str, ...],
    address: str | None,
    cluster_file: Path | None,
    quiet: bool,
    as_events: bool,
    as_json: bool,
    rehearse: bool,
) -> None:
    """Prune, search, distill, evaluate and export, as each EXPERIMENT file says.

    What another EXPERIMENT starts from (start.experiment) is run before it, whatever the order here.

    Run the same file again to go on after an interruption: finished stages are reused. Ctrl-C stops
    at the next safe point, a second Ctrl-C at once. --json prints a list, a ranking for each EXPERIMENT.

    --rehearse first finds out what would fail: the same files on the same cluster, with small models of the
    same family, spaces and tokens divided down. Models and text are looked at: stand-ins take the place of
    what is missing, which is told at the end, with exit code 2. It leaves its runs in DIR/.rehearsal until
    the next one, and nothing else ever takes them for results.
    """
    from minitron_ray.cli.chain import check_starts, in_order
    from minitron_ray.cli.launch import cluster_settings, launch, read_experiments

    settings = cluster_settings(cluster_file, address)
    loaded = in_order(read_experiments(experiments, overrides), lambda one: one.experiment)
    if rehearse:
        from minitron_ray.cli.rehearse import rehearse as go_through

        go_through(loaded, results, settings, quiet=quiet, as_json=as_json, as_events=as_events)
        return
    check_starts([one.experiment for one in loaded], results)
    launch(loaded, results, settings, quiet=quiet, as_json=as_json, as_events=as_events)
