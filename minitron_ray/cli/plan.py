"""`minitron-ray plan`: what a run would do, by arithmetic."""

from __future__ import annotations

from pathlib import Path

import click

from minitron_ray.cli.options import experiments_argument, json_option, results_option, set_option


@click.command()
@experiments_argument
@results_option
@set_option
@json_option
def plan(experiments: tuple[Path, ...], results: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Count the teacher and every candidate of each EXPERIMENT, what the stages would cost, and which of
    them earlier runs have finished.

    Nothing is downloaded and no tensor is loaded.
    """
    import json

    from rich.console import Console

    from minitron_ray.cli.planning import plan_file
    from minitron_ray.report.plan_text import as_json as to_json
    from minitron_ray.report.plan_text import render
    from minitron_ray.stages.reuse import finished

    plans = [plan_file(path, results, overrides) for path in experiments]
    known = [
        finished(results, one, path.resolve().parent) for one, path in zip(plans, experiments, strict=True)
    ]
    if as_json:
        click.echo(json.dumps([to_json(*pair) for pair in zip(plans, known, strict=True)], indent=2))
        return
    console = Console(highlight=False)
    for one, done in zip(plans, known, strict=True):
        render(one, console, done)
