"""Files of this machine or of an object store, read alike: `texts/a.txt`, `s3://bucket/texts/a.jsonl.zst`.

An address `scheme://place/folder/**/*.parquet?option=value` may hold `*`, `**/` and `[...]` in its path;
what follows a `?` are the options of pyarrow's file systems (`region`, `endpoint_override`, `scheme`).
Credentials come from where the store's own tools look for them, never from the address, which is stored
with the run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs as pafs

from minitron_ray.core.errors import ConfigError, EnvironmentFailure
from minitron_ray.data.archive import translate

SCHEMES: Final = ("s3", "gs", "file")
"""Of addresses; those that pyarrow's wheels have and that need no other software."""
COMPRESSIONS: Final = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""By suffix; what is compressed is read from its beginning to its end."""
_MAGIC: Final = re.compile(r"[*\[]")
_SECRET: Final = re.compile(r"[?&][^=&]*(key|secret|token|password)", re.IGNORECASE)
"""Options of an address that no store takes, and that would give a secret away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file, where it is and how large. Picklable."""

    where: str
    """For people: a local path or an address."""
    path: str
    """In its file system."""
    size: int
    """Bytes as stored."""
    modified: int
    """Nanoseconds since 1970."""
    system: Any = None
    """A pyarrow file system; None is this machine's."""

    @property
    def suffix(self) -> str:
        """Of what is inside, in lower case: `.jsonl` of `a.jsonl.zst`, `.zst` of `a.zst`."""
        name = PurePosixPath(self.path.lower())
        return name.with_suffix("").suffix or name.suffix if name.suffix in COMPRESSIONS else name.suffix

    @property
    def compression(self) -> str | None:
        """The codec's name; None where it is stored as it stands."""
        return COMPRESSIONS.get(PurePosixPath(self.path.lower()).suffix)

    @contextmanager
    def open(self) -> Iterator[Any]:
        """A binary stream of what is inside, which can be sought where nothing is compressed.

        Raises EnvironmentFailure where it can't be read, also for what fails inside the block.
        """
        system = self.system or pafs.LocalFileSystem()
        try:
            if self.compression is None:
                opened = system.open_input_file(self.path)
            else:
                opened = system.open_input_stream(self.path, compression=self.compression)
            with opened as stream:
                yield stream
        except OSError as error:
            raise EnvironmentFailure(
                f"{self.where} can't be read: {_reason(error)}; mend that, then run the same command again: what is "
                f"tokenised stays"
            ) from error


def local_file(path: Path) -> StoredFile:
    """One of this machine. Raises OSError where it is not there."""
    found = path.stat()
    return StoredFile(where=str(path), path=str(path), size=found.st_size, modified=found.st_mtime_ns)


def is_address(path: str) -> bool:
    return "://" in path


def check_address(address: str) -> None:
    """Raises ValueError, which pydantic turns into a positioned message, for an address of no use here."""
    scheme, _, rest = address.partition("://")
    place = rest.partition("/")[0]
    if scheme not in SCHEMES:
        hint = "; for a package's files use kind: pypi" if scheme == "pypi" else ""
        raise ValueError(
            f"{address} begins with {scheme}://, known are {', '.join(f'{s}://' for s in SCHEMES)}{hint}"
        )
    if ("@" in place and not place.startswith("anonymous@")) or _SECRET.search(rest):
        raise ValueError(
            "an address with a key in it would be stored with the run; leave it out and give the key the "
            "way the store's own tools take it, such as AWS_ACCESS_KEY_ID or GOOGLE_APPLICATION_CREDENTIALS"
        )


def find_stored(address: str, of_folder: tuple[str, ...]) -> dict[str, StoredFile]:
    """The files of an address by their name relative to its fixed part; of a folder, those whose suffix is
    one of `of_folder`. Empty where there are none.

    Raises EnvironmentFailure where the store does not answer or refuses.
    """
    plain, mark, options = address.partition("?")
    scheme, _, rest = plain.partition("://")
    parts = rest.rstrip("/").split("/")
    fixed = list(itertools.takewhile(lambda part: not _MAGIC.search(part), parts))
    pattern = "/".join(parts[len(fixed) :])
    root_address = f"{scheme}://{'/'.join(fixed)}"
    try:
        system, root = pafs.FileSystem.from_uri(f"{root_address}{mark}{options}")
        info = system.get_file_info(root)
        if info.type == pafs.FileType.File and not pattern:
            return {info.base_name: _stored(info, root_address, system)}
        selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
        listed = [found for found in system.get_file_info(selector) if found.type == pafs.FileType.File]
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{address} is not an address that can be read: {_reason(error)}") from error
    except OSError as error:
        raise EnvironmentFailure(
            f"{address} can't be listed: {_reason(error)}; check the name, the network and the credentials"
        ) from error
    fits = re.compile(translate(pattern or "**/*")).fullmatch
    files: dict[str, StoredFile] = {}
    for found in sorted(listed, key=lambda found: found.path):
        name = found.path[len(root) :].lstrip("/")
        stored = _stored(found, f"{root_address.rstrip('/')}/{name}", system)
        if fits(name) and (pattern or stored.suffix in of_folder):
            files[name] = stored
    return files


def _stored(info: Any, where: str, system: Any) -> StoredFile:
    return StoredFile(
        where=where, path=info.path, size=info.size or 0, modified=info.mtime_ns or 0, system=system
    )


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
