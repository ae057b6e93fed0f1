"""`minitron-ray ablation`: run the variants of one question, and print them beside the paper's figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from minitron_ray.cli.options import (
    address_option,
    cluster_option,
    json_option,
    quiet_option,
    results_option,
)
from minitron_ray.core.errors import ConfigError, EnvironmentFailure, Interrupted, MinitronError

if TYPE_CHECKING:
    from minitron_ray.ablation import AblationFile, Variant
    from minitron_ray.execution.settings import ClusterSettings
    from minitron_ray.report.ablation import Comparison, Outcome
    from minitron_ray.results.runs import RunInfo


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@results_option
@click.option(
    "--only", metavar="VARIANT", multiple=True, help="Run this variant, list all of them. Repeatable."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results/paper"),
    show_default=True,
    help="Folder for the table, as NAME.csv and NAME.md.",
)
@address_option
@cluster_option
@quiet_option
@json_option
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
def ablation(
    file: Path,
    results: Path,
    only: tuple[str, ...],
    out: Path,
    address: str | None,
    cluster_file: Path | None,
    quiet: bool,
    as_json: bool,
    as_markdown: bool,
) -> None:
    """Run every variant of the ablation FILE as an experiment of its own, and compare them.

    Run it again to go on after an interruption: finished variants, and stages that variants share, are
    reused. A variant that fails is said to have failed, and the others are run.
    """
    from minitron_ray.ablation import read_ablation
    from minitron_ray.cli.launch import cluster_settings

    if as_json and as_markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    read = read_ablation(file)
    chosen = _chosen(read, file, only)
    driven = _Driven(results.expanduser().resolve(), cluster_settings(cluster_file, address), quiet)
    driven.run_all(chosen)
    comparison = driven.comparison(read)
    _write(comparison, out)
    _show(comparison, as_json=as_json, as_markdown=as_markdown)
    driven.raise_failures(len(chosen))


def _chosen(read: AblationFile, file: Path, only: tuple[str, ...]) -> tuple[Variant, ...]:
    from minitron_ray.core.sections import nearest

    names = [variant.name for variant in read.variants]
    for name in only:
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean '{near}'?" if near else f"they are {', '.join(names)}"
            raise ConfigError(f"--only {name}: {file} has no such variant; {hint}")
    return tuple(variant for variant in read.variants if not only or variant.name in only)


class _Driven:
    """The variants run by this command, and how each of them ended."""

    def __init__(self, results: Path, settings: ClusterSettings, quiet: bool) -> None:
        self._results, self._settings, self._quiet = results, settings, quiet
        self._runs: dict[str, RunInfo] = {}
        self._errors: dict[str, MinitronError] = {}

    def run_all(self, variants: tuple[Variant, ...]) -> None:
        """Goes on after a variant that failed, not after Ctrl-C nor on a machine that can't be used."""
        from minitron_ray.cli.launch import Loaded, check_plan, drive
        from minitron_ray.results.runs import read_info

        loaded = {
            v.name: Loaded(experiment=v.experiment, base=v.base, source=v.source, overrides=())
            for v in variants
        }
        for name, experiment in loaded.items():
            try:
                check_plan(experiment)
            except ConfigError as error:
                raise ConfigError(f"variant {name}: {error.message}") from None
        for number, (name, experiment) in enumerate(loaded.items(), start=1):
            if not self._quiet:
                click.echo(f"variant {number} of {len(loaded)}: {name}", err=True)
            try:
                run = drive(experiment, self._results, self._settings, quiet=self._quiet)
                self._runs[name] = read_info(run.folder)
            except MinitronError as error:
                self._errors[name] = error
                if isinstance(error, Interrupted | EnvironmentFailure):
                    break

    def comparison(self, read: AblationFile) -> Comparison:
        """Of all variants of the file, run now or before."""
        from minitron_ray.report.ablation import compare

        return compare(
            read.ablation, [self._outcome(variant, read.ablation.measure) for variant in read.variants]
        )

    def _outcome(self, variant: Variant, measure: str) -> Outcome:
        from minitron_ray.report.ablation import Outcome, outcome_of, recorded_run

        error = self._errors.get(variant.name)
        run = self._runs.get(variant.name) or recorded_run(self._results, variant.experiment)
        if error is None:
            return (
                outcome_of(variant.name, run, measure)
                if run
                else Outcome(variant=variant.name, status="not run")
            )
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        return Outcome(
            variant=variant.name,
            status=status,
            reason="stopped by request; run it again to go on" if status == "interrupted" else error.message,
            run_id=run.run_id if run else None,
        )

    def raise_failures(self, count: int) -> None:
        """Ends the command as `run` would have ended: Ctrl-C first, else as the first failure."""
        for error in self._errors.values():
            if isinstance(error, Interrupted):
                raise error
        for error in self._errors.values():
            raise type(error)(
                f"{len(self._errors)} of {count} variants failed: {', '.join(self._errors)}; "
                f"the first said: {error.message}"
            )


def _write(comparison: Comparison, out: Path) -> None:
    from minitron_ray.report.ablation_text import csv_text, markdown
    from minitron_ray.results.files import make_folder, write_file

    folder = make_folder(out)
    write_file(folder / f"{comparison.ablation}.csv", csv_text(comparison).encode())
    write_file(folder / f"{comparison.ablation}.md", markdown(comparison).encode())


def _show(comparison: Comparison, *, as_json: bool, as_markdown: bool) -> None:
    from minitron_ray.report.ablation_text import markdown, render

    if as_json:
        import json

        from minitron_ray.results.files import finite

        click.echo(json.dumps(finite(comparison.as_json()), indent=2, allow_nan=False))
    elif as_markdown:
        click.echo(markdown(comparison), nl=False)
    else:
        from rich.console import Console

        render(comparison, Console(highlight=False))
