"""How commands end: one line and an exit code for a user's mistake, a traceback only for a bug."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from minitron_ray.cli import main
from minitron_ray.cli.group import CommandLine
from minitron_ray.core.errors import (
    ConfigError,
    EnvironmentFailure,
    Interrupted,
    MinitronError,
    NotFound,
)

ROOT = Path(__file__).parents[2]


def ending_with(error: BaseException):
    @click.group(cls=CommandLine)
    def group() -> None: ...

    @group.command()
    def command() -> None:
        raise error

    return CliRunner().invoke(group, ["command"])


@pytest.mark.parametrize(
    ("error", "stderr", "code"),
    [
        (MinitronError("the run failed"), "error: the run failed\n", 1),
        (ConfigError("x.yaml:3:4: a: bad\n--set b=1: bad"), "x.yaml:3:4: a: bad\nerror: --set b=1: bad\n", 2),
        (EnvironmentFailure("no network"), "error: no network\n", 3),
        (NotFound("no run 'x'"), "error: no run 'x'\n", 4),
        (Interrupted("stopped; run again to go on"), "error: stopped; run again to go on\n", 130),
        (KeyboardInterrupt(), "interrupted\n", 130),
        (BrokenPipeError(), "", 141),
    ],
    ids=lambda value: type(value).__name__,
)
def test_endings(error, stderr, code):
    result = ending_with(error)
    assert (result.stderr, result.exit_code) == (stderr, code)


def test_a_bug_is_not_hidden():
    error = ZeroDivisionError("bug")
    assert ending_with(error).exception is error


def test_a_misspelt_command():
    result = CliRunner().invoke(main, ["valdate"])
    assert "No such command 'valdate'; did you mean 'validate'?" in result.stderr
    assert result.exit_code == 2


def test_all_commands_are_there_and_explained():
    expected = {
        "ablation",
        "init",
        "validate",
        "plan",
        "run",
        "prune",
        "report",
        "query",
        "runs",
        "doctor",
        "schema",
        "submit",
        "watch",
    }
    assert expected == set(main.commands)
    for name in expected:
        result = CliRunner().invoke(main, [name, "-h"])
        assert result.exit_code == 0, result.output
        assert main.commands[name].help


def test_a_reader_that_goes_away_is_no_error():
    """`minitron-ray schema | head -c 1`, with a pipe too small for the output."""
    command = [sys.executable, "-m", "minitron_ray", "schema"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait() == 141
