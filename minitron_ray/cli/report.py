"""`minitron-ray report`: the ranking of one run."""

from __future__ import annotations

from pathlib import Path

import click

from minitron_ray.cli.options import json_option, results_option


@click.command()
@click.argument("run", required=False)
@results_option
@json_option
@click.option("--md", "as_markdown", is_flag=True, help="Print the ranking as Markdown.")
def report(run: str | None, results: Path, as_json: bool, as_markdown: bool) -> None:
    """Rank the students of RUN: a run id or its start, or an experiment. Without RUN: the newest run."""
    from minitron_ray.report.ranking import rank
    from minitron_ray.results.runs import resolve_run

    if as_json and as_markdown:
        raise click.UsageError("--json and --md exclude each other")
    ranking = rank(resolve_run(results, run))
    if as_json:
        import json

        from minitron_ray.results.files import finite

        click.echo(json.dumps(finite(ranking.as_json()), indent=2, allow_nan=False))
    elif as_markdown:
        from minitron_ray.report.text import markdown

        click.echo(markdown(ranking), nl=False)
    else:
        from rich.console import Console

        from minitron_ray.report.text import render

        render(ranking, Console(highlight=False))
