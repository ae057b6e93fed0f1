"""`minitron-ray plan`: what a run would do, by arithmetic."""

from __future__ import annotations

from pathlib import Path

import click

from minitron_ray.cli.options import (
    cluster_option,
    experiments_argument,
    json_option,
    results_option,
    set_option,
)


@click.command()
@experiments_argument
@results_option
@set_option
@cluster_option
@click.option("--probe", is_flag=True, help="Measure once how fast this machine trains (half a minute).")
@json_option
def plan(
    experiments: tuple[Path, ...],
    results: Path,
    overrides: tuple[str, ...],
    cluster_file: Path | None,
    probe: bool,
    as_json: bool,
) -> None:
    """Count the teacher and every candidate of each EXPERIMENT, what the stages would cost, and which of
    them earlier runs have finished. What another EXPERIMENT starts from comes first.

    Nothing is downloaded. Device time is counted for the `devices` of the cluster file, or for this
    machine once it was measured; without --probe no tensor is loaded.
    """
    import json

    from rich.console import Console

    from minitron_ray.cli.launch import cluster_settings
    from minitron_ray.cli.planning import hardware_of, plan_files
    from minitron_ray.plan.saving import family_saving
    from minitron_ray.report.cost_text import family_line
    from minitron_ray.report.plan_text import as_json as to_json
    from minitron_ray.report.plan_text import render
    from minitron_ray.stages.hardware import layout_of
    from minitron_ray.stages.reuse import finished

    settings = cluster_settings(cluster_file, None)
    planned = plan_files(experiments, results, overrides)
    plans = [one for _, one in planned]
    known = [finished(results, one, path.resolve().parent) for path, one in planned]
    hardware = [hardware_of(one, settings, results, probe=probe) for one in plans]
    saving = family_saving(plans)
    before = [
        [one for there, one in planned[:number] if there.resolve().parent == path.resolve().parent]
        for number, (path, _) in enumerate(planned)
    ]
    if as_json:
        shown = [
            to_json(one, done, device, layout_of(settings, device), first)
            for one, done, device, first in zip(plans, known, hardware, before, strict=True)
        ]
        shown[-1]["family_saving"] = None if saving is None else saving.as_json()
        click.echo(json.dumps(shown, indent=2))
        return
    console = Console(highlight=False)
    for number, (one, done, device, first) in enumerate(zip(plans, known, hardware, before, strict=True)):
        if number:
            console.print()
        render(one, console, done, device, layout_of(settings, device), first)
    if saving is not None:
        console.print()
        console.print(f"{'family':<11} {family_line(saving)}", soft_wrap=True)
