"""How a model or a text is named: a hub id, a local path, or `pypi://package==version/path/inside`."""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "pypi://"
LOCAL = ("/", "./", "../", "~")
"""What a local path begins with: anything else could be the id of a model on the hub."""
_FORM = re.compile(r"pypi://([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)/(\S.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PypiLocation:
    """A package, its exact version, and a path or pattern inside its archive."""

    package: str
    version: str
    inside: str

    @property
    def is_pattern(self) -> bool:
        return any(sign in self.inside for sign in "*?[")

    def __str__(self) -> str:
        return f"{PREFIX}{self.package}=={self.version}/{self.inside}"


def is_hub_id(path: str) -> bool:
    """Whether `path` is neither a local path nor a package's file."""
    return not path.startswith((*LOCAL, PREFIX))


def parse_pypi(text: str) -> PypiLocation:
    """Raises ValueError, which pydantic turns into a positioned message, for any other form."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not of the form pypi://package==version/path/inside")
    package, version, inside = match.groups()
    if ".." in inside.split("/") or inside.startswith("/"):
        raise ValueError(f"{text!r} points outside its package")
    return PypiLocation(package=package, version=version, inside=inside)
