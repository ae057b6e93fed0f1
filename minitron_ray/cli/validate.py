"""`minitron-ray validate`: every mistake of an experiment file at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minitron_ray.cli.options import experiments_argument, json_option, set_option
from minitron_ray.core.errors import ConfigError


@click.command()
@experiments_argument
@set_option
@json_option
def validate(experiments: tuple[Path, ...], overrides: tuple[str, ...], as_json: bool) -> None:
    """Check experiment and ablation files; nothing is fetched or run.

    Prints one line a mistake on stderr, FILE:LINE:COLUMN: KEY: PROBLEM, and ends with 2 if there is one.
    """
    reports = [_report(path, overrides) for path in experiments]
    valid = all(report["ok"] for report in reports)
    if as_json:
        import json

        click.echo(json.dumps([{k: v for k, v in r.items() if k != "text"} for r in reports], indent=2))
        if not valid:
            raise click.exceptions.Exit(ConfigError.exit_code)
        return
    for report in reports:
        if report["ok"]:
            click.echo(f"ok: {report['file']}")
    if not valid:
        raise ConfigError("\n".join(report["text"] for report in reports if not report["ok"]))


def _report(path: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    from minitron_ray.ablation import check_ablation, is_ablation
    from minitron_ray.core.loading import check
    from minitron_ray.core.yaml import dotted
    from minitron_ray.experiment import Experiment

    report: dict[str, Any] = {"file": str(path), "ok": True, "problems": [], "text": ""}
    try:
        if is_ablation(path):
            if overrides:
                raise ConfigError(f"--set {overrides[0]}: {path} is an ablation file; edit its base instead")
            problems = check_ablation(path)[1]
        else:
            problems = check(path, Experiment, overrides).problems
    except ConfigError as error:  # nothing to point at: no such file, not YAML
        return report | {"ok": False, "problems": [_unreadable(error, path)], "text": error.message}
    if not problems:
        return report
    found = [
        _entry(
            problem.mark.origin, problem.mark.line, problem.mark.column, dotted(problem.path), problem.text
        )
        for problem in problems
    ]
    return report | {"ok": False, "problems": found, "text": "\n".join(map(str, problems))}


def _unreadable(error: ConfigError, path: Path) -> dict[str, Any]:
    import re

    match = re.fullmatch(rf"{re.escape(str(path))}(?::(\d+):(\d+))?: (.*)", error.message, re.DOTALL)
    if match is None:  # an option
        return _entry("--set", 0, 0, "", error.message)
    return _entry(str(path), int(match[1] or 0), int(match[2] or 0), "", match[3])


def _entry(origin: str, line: int, column: int, key: str, problem: str) -> dict[str, Any]:
    """`origin` is the file or the option; line and column are null where there is none."""
    return {
        "origin": origin,
        "line": line or None,
        "column": column or None,
        "key": key or None,
        "problem": problem,
    }
