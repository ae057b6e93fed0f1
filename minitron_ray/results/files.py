"""Files that are either there in full or not there: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, Final

from minitron_ray.core.errors import EnvironmentFailure

_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def make_folder(path: Path) -> Path:
    """Creates a folder with its parents. Raises EnvironmentFailure where that is not allowed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise cannot_write(path, PermissionError(None, "no write permission"))
    return path


def cannot_write(path: Path, error: OSError) -> EnvironmentFailure:
    """The one line for a place that can't be written."""
    why = (error.strerror or str(error)).lower()
    return EnvironmentFailure(
        f"cannot write to {path}: {why}; choose another results folder with --results DIR, or free this one"
    )


def write_file(path: Path, content: bytes) -> None:
    """Puts a file in place atomically and durably. Raises EnvironmentFailure where it can't be written."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Removes what `write_file` left in a folder when its process was killed. Nobody may be writing there."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_file` of readable JSON; NaN and infinities, which JSON lacks, become null."""
    write_file(path, (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """The same JSON value with every NaN and infinity replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def sync_folder(path: Path) -> None:
    """Makes renames inside a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Makes everything below a folder survive a power cut."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync_folder(Path(folder) / name)
        sync_folder(Path(folder))


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for the same bytes; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def folder_size(path: Path) -> int:
    """Bytes of the files below a folder; those that go meanwhile count for nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(folder) / name).lstat().st_size
    return total


def remove_tree(path: Path) -> None:
    """Removes a folder if it is there."""
    if path.exists():
        shutil.rmtree(path)
