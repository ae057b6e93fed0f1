"""Packages in a folder that pip may use as its only index."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder) / "{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name
def build_wheel(*arguments):
    raise SystemExit("a source distribution must never be built")
"""


def isolated_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a folder pip's whole world; fill it with `add_wheel` and `add_sdist`."""
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


def add_wheel(index: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> Path:
    """A pure wheel that needs a package no index has, as `--no-deps` must not care."""
    path = index / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: not-on-any-index\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, content in files.items():
            wheel.writestr(inside, content)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def add_sdist(index: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> Path:
    """A source distribution whose in-tree backend needs no other package and refuses to build."""
    path = index / f"{name}-{version}.tar.gz"
    backend = BACKEND.format(name=name, version=version)
    project = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    everything = {"backend.py": backend.encode(), "pyproject.toml": project, "PKG-INFO": metadata, **files}
    with tarfile.open(path, "w:gz") as tar:
        for inside, content in everything.items():
            member = tarfile.TarInfo(f"{name}-{version}/{inside}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
