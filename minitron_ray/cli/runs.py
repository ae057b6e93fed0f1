"""`minitron-ray runs`: what is in the results folder."""

from __future__ import annotations

from pathlib import Path

import click

from minitron_ray.cli.options import json_option, results_option


@click.command()
@results_option
@json_option
def runs(results: Path, as_json: bool) -> None:
    """List all runs, the newest last."""
    from minitron_ray.report import listing
    from minitron_ray.results.runs import find_runs

    lines = [listing.summarise(run) for run in find_runs(results)]
    if as_json:
        import json

        click.echo(json.dumps([line.as_json() for line in lines], indent=2, allow_nan=False))
    elif not lines:
        click.echo(f"no runs in {results}; start one with `minitron-ray run EXPERIMENT`", err=True)
    else:
        from rich.console import Console

        listing.render(lines, Console(highlight=False))
