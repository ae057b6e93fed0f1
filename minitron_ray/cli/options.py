"""Options and arguments that several commands share, so that they are spelled and explained alike."""

from __future__ import annotations

from pathlib import Path

import click

experiments_argument = click.argument(
    "experiments", metavar="EXPERIMENT...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
"""`experiments: tuple[Path, ...]`, at least one; their reader says which do not exist."""

results_option = click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="MINITRON_RAY_RESULTS",
    default=Path("results"),
    show_default=True,
    show_envvar=True,
    help="Folder of all runs and caches.",
)
"""`results: Path`."""

set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Replace a value of the experiment, like --set distill.tokens=1M. Repeatable.",
)
"""`overrides: tuple[str, ...]`, each `a.b=c`."""

address_option = click.option(
    "--address",
    help="host:port of a running Ray cluster (default: the cluster file's, else RAY_ADDRESS, else start Ray here).",
)
"""`address: str | None`."""

cluster_option = click.option(
    "--cluster",
    "cluster_file",
    type=click.Path(path_type=Path),
    help="A file of cluster/: where to run, how wide.",
)
"""`cluster_file: Path | None`."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
"""`as_json: bool`."""


events_option = click.option(
    "--events", "as_events", is_flag=True, help="Tell the run on stderr as lines of JSON, an event each."
)
"""`as_events: bool`."""

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Say only what went wrong.")
"""`quiet: bool`."""
