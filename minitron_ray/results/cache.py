"""`Cache`: folders that are expensive to make, found again by a digest of everything they depend on.

    results/.cache/<kind>/<digest>/ ... DONE.json

An entry exists only whole: it is filled under a temporary name, `DONE.json` is written last, and
the folder is renamed. A killed build leaves a `.partial` folder which the next build removes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minitron_ray.results.files import (
    cannot_write,
    make_folder,
    remove_tree,
    sync_folder,
    sync_tree,
    write_json,
)

DONE = "DONE.json"
_LOOK_S = 1.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Cache:
    """The cache of a results folder. Safe for any number of processes; nothing is touched until a build."""

    def __init__(self, results: Path) -> None:
        self.folder = Path(results) / ".cache"

    def find(self, kind: str, digest: str) -> Path | None:
        """The folder of a complete entry, or None."""
        entry = self._entry(kind, digest)
        return entry if (entry / DONE).is_file() else None

    def ensure(
        self,
        kind: str,
        digest: str,
        describe: dict[str, Any],
        fill: Callable[[Path], None],
        waiting: Callable[[], None] = lambda: None,
    ) -> Path:
        """The entry's folder, calling `fill(folder)` only if no process has made it before.

        Waits while another process fills the same entry, calling `waiting` every second; what that raises
        ends the wait. What `fill` leaves in its folder becomes the entry; if it raises, nothing does.
        `describe` goes into DONE.json for a human reader. Raises EnvironmentFailure where the cache can't be
        written.
        """
        found = self.find(kind, digest)
        if found is not None:
            return found
        with self._locked(kind, digest, waiting):
            if self.find(kind, digest) is None:
                with self._filling(kind, digest, describe) as folder:
                    fill(folder)
        return self._entry(kind, digest)

    def _entry(self, kind: str, digest: str) -> Path:
        for segment in (kind, digest):
            if not _SEGMENT.fullmatch(segment):
                raise ValueError(f"{segment!r} cannot name a cache entry: letters, digits, '.', '_', '-'")
        return self.folder / kind / digest

    @contextmanager
    def _locked(self, kind: str, digest: str, waiting: Callable[[], None]) -> Iterator[None]:
        entry = self._entry(kind, digest)
        make_folder(entry.parent)
        lock = FileLock(entry.with_name(f"{digest}.lock"))
        while True:
            try:
                lock.acquire(timeout=_LOOK_S)
                break
            except Timeout:
                waiting()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _filling(self, kind: str, digest: str, describe: dict[str, Any]) -> Iterator[Path]:
        entry = self._entry(kind, digest)
        temporary = entry.with_name(f"{digest}.partial")
        remove_tree(temporary)
        make_folder(temporary)
        try:
            try:
                yield temporary
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                full = Path(error.filename) if error.filename else entry  # not all is written there
                raise cannot_write(full, error) from error
            if self.find(kind, digest) is None:
                self._publish(temporary, entry, describe)
        finally:
            remove_tree(temporary)

    @staticmethod
    def _publish(temporary: Path, entry: Path, describe: dict[str, Any]) -> None:
        try:
            sync_tree(temporary)
            write_json(temporary / DONE, {**describe, "made_at": datetime.now(UTC).isoformat()})
            remove_tree(entry)  # something without DONE.json that was never an entry
            temporary.rename(entry)
            sync_folder(entry.parent)
        except OSError as error:
            raise cannot_write(entry, error) from error
