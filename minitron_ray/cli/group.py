"""`CommandLine`: the group whose commands end with one line and an exit code, not with a traceback."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import click

from minitron_ray.core.errors import MinitronError

_POSITION = re.compile(r"\S.*?:\d+:\d+: ")
_CLOSED_PIPE = 141  # as if ended by SIGPIPE
_CTRL_C = 130


class CommandLine(click.Group):
    """A user's mistakes are messages on stderr; only a bug of this program shows a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe can still be handled
            return value
        except MinitronError as error:
            click.echo("\n".join(map(_line, error.message.splitlines())), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_CTRL_C)
        except BrokenPipeError:
            _discard_stdout()
            ctx.exit(_CLOSED_PIPE)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            if args and (near := get_close_matches(args[0], self.list_commands(ctx), n=1)):
                text = f"No such command {args[0]!r}; did you mean {near[0]!r}?"
                raise click.UsageError(text, ctx) from error
            raise


def _line(text: str) -> str:
    """A line of a message, marked as an error unless it starts with its position in a file."""
    return text if _POSITION.match(text) or text.startswith(" ") else f"error: {text}"


def _discard_stdout() -> None:
    """Nobody reads on: the interpreter's own last flush must not fail again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is not a file, in tests
        return
