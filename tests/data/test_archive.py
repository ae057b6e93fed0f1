"""What leaves an archive: what fits the pattern, and nothing that could do harm."""

from __future__ import annotations

import hashlib
import io
import random
import re
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.data.archive import extract, translate


@pytest.mark.parametrize(
    ("pattern", "fits", "does_not"),
    [
        (
            "docs/**/*.txt",
            ["docs/a.txt", "docs/x/y/a.txt"],
            ["docs/a.rst", "a.txt", "xdocs/a.txt", "docs/a.txt2"],
        ),
        ("docs/*.txt", ["docs/a.txt"], ["docs/x/a.txt"]),
        ("a/?.[ch]", ["a/x.c", "a/y.h"], ["a/xy.c", "a/x.o", "a/x/c"]),
        ("a/[!b].c", ["a/x.c"], ["a/b.c"]),
        ("a/", ["a/b", "a/b/c.txt"], ["a", "ab/c"]),
        ("m.Q4_1+x.gguf", ["m.Q4_1+x.gguf"], ["mxQ4_1+x.gguf"]),
    ],
)
def test_patterns(pattern: str, fits: list[str], does_not: list[str]) -> None:
    wanted = re.compile(translate(pattern))
    assert [name for name in fits + does_not if wanted.fullmatch(name)] == fits


def test_sdist_without_its_top_folder(tmp_path: Path) -> None:
    archive = tmp_path / "p-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        _add(tar, "p-1/docs/a.txt", b"A")
        _add(tar, "p-1/docs/deep/b.txt", b"B")
        _add(tar, "p-1/setup.py", b"C")
    found = extract(archive, "docs/**/*.txt", tmp_path / "out")
    assert found == {"docs/a.txt": _sha(b"A"), "docs/deep/b.txt": _sha(b"B")}
    assert (tmp_path / "out/docs/deep/b.txt").read_bytes() == b"B"


def test_nothing_leaves_the_folder_and_links_are_not_followed(tmp_path: Path) -> None:
    tar_file, zip_file = tmp_path / "evil-1.tar.gz", tmp_path / "evil-1-py3-none-any.whl"
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with tarfile.open(tar_file, "w:gz") as tar:
        for name in ("e-1/../../up.txt", "e-1//absolute.txt", "/e/root.txt/../../x.txt"):
            _add(tar, name, b"bad")
        link = tarfile.TarInfo("e-1/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
        _add(tar, "e-1/good.txt", b"good")
    with zipfile.ZipFile(zip_file, "w") as wheel:
        for name in ("../up.txt", "/absolute.txt", "a/../../x.txt", "..\\windows.txt"):
            wheel.writestr(name, "bad")
        info = zipfile.ZipInfo("link.txt")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        wheel.writestr(info, str(secret))
        wheel.writestr("good.txt", "good")
    for index, archive in enumerate((tar_file, zip_file)):
        out = tmp_path / f"out{index}" / "inner"
        assert extract(archive, "**/*.txt", out) == {"good.txt": _sha(b"good")}
        assert [p.name for p in out.parent.rglob("*") if p.is_file()] == ["good.txt"]
    assert not (tmp_path / "up.txt").exists()


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    archive = tmp_path / "p-1.tar.gz"
    archive.write_bytes(b"no archive at all")
    with pytest.raises(EnvironmentFailure, match=r"p-1\.tar\.gz is damaged .* download it again"):
        extract(archive, "*", tmp_path / "out")
    with tarfile.open(archive, "w:gz") as tar:
        _add(tar, "p-1/a.txt", random.Random(0).randbytes(100_000))
    archive.write_bytes(archive.read_bytes()[:50_000])
    with pytest.raises(EnvironmentFailure, match=r"p-1\.tar\.gz is damaged"):
        extract(archive, "*", tmp_path / "out")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
