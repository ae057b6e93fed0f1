"""Some files out of a wheel or a source distribution, and none of them outside the target folder."""

from __future__ import annotations

import gzip
import hashlib
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from minitron_ray.core.errors import EnvironmentFailure


def extract(archive: Path, pattern: str, into: Path) -> dict[str, str]:
    """Copies the regular files whose path fits `pattern` (`*`, `?`, `[...]`, `**/`); sha256 by path.

    Paths are relative to the archive's root; of a source distribution, to its one top folder. Links,
    devices and paths that lead out of the folder are never extracted. Raises EnvironmentFailure for a
    damaged archive.
    """
    wanted = re.compile(translate(pattern))
    found: dict[str, str] = {}
    try:
        for name, stream in _members(archive, wanted):
            with stream:
                found[name] = _copy(stream, into / name)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(":")
        raise EnvironmentFailure(f"{archive.name} is damaged ({reason}); download it again") from error
    return dict(sorted(found.items()))


def translate(pattern: str) -> str:
    """The regular expression (for `fullmatch`) of a path pattern."""
    if pattern.endswith("/"):
        pattern += "**/*"
    parts = re.split(r"(\*\*/|\*+|\?|\[[^\]/]+\])", pattern)
    signs = {"**/": "(?:.*/)?", "?": "[^/]"}
    return "(?s:" + "".join(signs.get(part) or _sign(part) for part in parts) + r")\Z"


def _sign(part: str) -> str:
    if part.strip("*") == "" and part:
        return "[^/]*"
    if part.startswith("[") and part.endswith("]") and len(part) > 2:
        return "[" + part[1:-1].replace("\\", "\\\\").replace("!", "^", part[1] == "!") + "]"
    return re.escape(part)


def is_inside(name: str) -> bool:
    """Whether a path of an archive stays below the folder it is unpacked in."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _members(archive: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive, wanted, strip=archive.suffix == ".zip")
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is not None and is_inside(name) and wanted.fullmatch(name):
                yield name, stream


def _zip_members(archive: Path, wanted: re.Pattern[str], *, strip: bool) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            name = info.filename.partition("/")[2] if strip else info.filename
            kind = stat.S_IFMT(info.external_attr >> 16)
            regular = not info.is_dir() and kind in (0, stat.S_IFREG)
            if regular and is_inside(name) and wanted.fullmatch(name):
                yield name, zipped.open(info)


def _copy(stream: IO[bytes], target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.sha256()
    with target.open("wb") as out:
        while block := stream.read(1 << 20):
            checksum.update(block)
            out.write(block)
    return checksum.hexdigest()
