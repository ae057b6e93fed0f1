"""Every error a user can cause, and the exit code each one ends the command with.

    MinitronError              1  the run failed
    ├── ConfigError            2  the experiment file, an option or an input is wrong
    ├── EnvironmentFailure     3  the machine, a package client or the Ray cluster is not usable
    ├── NotFound               4  no such run, table or candidate
    └── Interrupted          130  stopped by the user at a safe point
        └── Terminated       143  likewise, by a SIGTERM

A message is one line: what was found, where, the rule, and what to do next. Arguments go to
`Exception.__init__` unchanged, so that an error survives pickling out of a Ray worker.
"""


class MinitronError(Exception):
    """The run failed for a reason that is not a bug of this program."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """The one line shown to the user."""
        return str(self.args[0])


class ConfigError(MinitronError):
    """The experiment file, a command-line option or an input file is wrong. May hold several lines."""

    exit_code = 2


class EnvironmentFailure(MinitronError):
    """The machine, a package client or the Ray cluster is not usable."""

    exit_code = 3


class NoRoom(EnvironmentFailure):
    """A cluster lacks the processors that were asked for, as of now."""


class NotFound(MinitronError):
    """A run, table or candidate was named that does not exist."""

    exit_code = 4


class Interrupted(MinitronError):
    """The user asked to stop; everything computed so far is kept."""

    exit_code = 130


class Terminated(Interrupted):
    """The same, where a scheduler or a node that goes away asked (SIGTERM)."""

    exit_code = 143
