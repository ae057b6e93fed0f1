"""`minitron-ray query`: SQL over the tables of all runs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from minitron_ray.cli.options import results_option


@click.command()
@click.argument("sql")
@results_option
@click.option(
    "--format", default="table", show_default=True, help="table, csv, json, jsonl, arrow or parquet."
)
def query(sql: str, results: Path, format: str) -> None:
    """Run one SELECT over the tables of all runs.

    \b
    Tables: runs, stages, costs, importance, candidates, zero_shot, trials, steps, sequence_losses,
    evaluations, comparisons, rank_correlations, lessons, exports, sources. `DESCRIBE trials` lists columns.
    """
    from minitron_ray.results import query as sql_over

    if format not in sql_over.FORMATS:  # before the work, not after it
        raise click.BadParameter(
            f"{format!r} is not one of {', '.join(sql_over.FORMATS)}", param_hint="--format"
        )
    sql_over.write(sql_over.query(results, sql), format, sys.stdout)
