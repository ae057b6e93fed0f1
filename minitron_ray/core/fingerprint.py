"""Digests that are equal in every process and on every machine for equal content."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of a value's canonical JSON: keys sorted, no spaces, ASCII.

    Takes None, bool, int, finite float, str, lists and tuples (which are alike), mappings with text
    keys, and pydantic models (by their JSON form). Raises TypeError, naming the place, for anything
    whose text could differ between two processes: sets, paths, arrays, NaN, objects.
    """
    text = json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _plain(value: Any, place: str) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"), place)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{place} is {value}: only finite numbers have a digest")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"{place} has the key {key!r} of type {type(key).__name__}: keys must be text"
                )
        return {key: _plain(item, f"{place}.{key}") for key, item in value.items()}
    raise TypeError(f"{place} is a {type(value).__name__}: it has no canonical JSON, so no digest")


def file_sha256(path: str | Path) -> str:
    """SHA-256 (64 hex digits) of a file's bytes, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
