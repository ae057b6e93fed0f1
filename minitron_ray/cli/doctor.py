"""`minitron-ray doctor`: what this machine has, and what would stop a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from minitron_ray.cli.options import address_option, cluster_option, json_option, results_option
from minitron_ray.core.errors import EnvironmentFailure

if TYPE_CHECKING:
    from minitron_ray.cli.machine import Finding

_MARKS = {"ok": "ok  ", "warning": "warn", "failure": "FAIL"}


@click.command()
@results_option
@cluster_option
@address_option
@json_option
def doctor(results: Path, cluster_file: Path | None, address: str | None, as_json: bool) -> None:
    """Check versions, devices, disk, the results folder and Ray's authentication.

    With --cluster or --address it also joins that cluster as a run would: token, room for the workers, and on every
    node the same versions and the results folder. Ends with 3 if a run could not work here.
    """
    from minitron_ray.cli.launch import cluster_settings
    from minitron_ray.cli.machine import examine

    named = cluster_file is not None or address is not None
    findings = examine(results, cluster_settings(cluster_file, address) if named else None)
    if as_json:
        import dataclasses
        import json

        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(_line(finding))
    failures = [finding.name for finding in findings if finding.status == "failure"]
    if failures:
        raise EnvironmentFailure(f"a run can't work here: {', '.join(failures)}")


def _line(finding: Finding) -> str:
    hint = f"; {finding.hint}" if finding.hint else ""
    return f"{_MARKS[finding.status]}  {finding.name:<14}  {finding.value}{hint}"
