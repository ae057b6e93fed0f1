"""Finding text files and reading documents out of them, in an order that mixes topics."""

from __future__ import annotations

import glob
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.fingerprint import digest, file_sha256
from minitron_ray.data.rows import JSONL, PARQUET, read_rows
from minitron_ray.data.source import Document

_IN_FOLDERS: Final = (".txt", *JSONL, *PARQUET)
"""What is read of a folder; a pattern may name text files of any other suffix."""
_NOT_TEXT: Final = (".json", ".csv", ".tsv", ".arrow", ".npy", ".gz", ".bz2", ".xz", ".zst", ".zip")


def find_files(path: str, base: Path) -> dict[str, Path]:
    """The files of a path or pattern by their name relative to its fixed part.

    Raises ConfigError where there are none.
    """
    pattern = Path(path).expanduser()
    full = base / pattern
    if full.is_file():
        return {full.name: full}
    if full.is_dir():
        candidates = sorted(p for p in full.rglob("*") if p.suffix.lower() in _IN_FOLDERS)
        root = full
    else:
        root = base / _fixed_part(pattern)
        found = glob.glob(str(pattern), root_dir=base, recursive=True)  # noqa: PTH207 - takes absolute ones too
        candidates = [base / name for name in sorted(found)]
    names = {p.relative_to(root).as_posix(): p for p in candidates if p.is_file()}
    if not names:
        raise ConfigError(_nothing_there(full))
    return names


def find_tokens(path: str, base: Path) -> Path:
    """The one file of a `tokens` source. Raises ConfigError where it is not there."""
    full = base / Path(path).expanduser()
    if not full.is_file():
        raise ConfigError(
            f"no such file: {full}; `data.source.path` names one parquet, arrow, jsonl or npy file"
        )
    return full


def in_order(files: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """By sha256 of the name, so that every slice of the text mixes its folders."""
    return sorted(files.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def content_digest(files: Mapping[str, Path]) -> str:
    """What the documents depend on: each file's bytes and format, in the order they are read."""
    return digest([[path.suffix.lower(), file_sha256(path)] for _, path in in_order(files)])


def read_documents(files: Mapping[str, Path], column: str) -> Iterator[Document]:
    """Every text of every file that is not blank. Raises ConfigError for what can't be read as text."""
    for name, path in in_order(files):
        if path.suffix.lower() in (*JSONL, *PARQUET):
            yield from _texts_of_rows(name, path, column)
        else:
            text = _whole_text(name, path)
            if text.strip():
                yield Document(text=text, origin=name)


def _texts_of_rows(name: str, path: Path, column: str) -> Iterator[Document]:
    for place, value in read_rows(path, column):
        if value is not None and not isinstance(value, str):
            raise ConfigError(_not_a_text(path, place, column, value))
        if value and value.strip():
            yield Document(text=value, origin=f"{name}:{place}")


def _whole_text(name: str, path: Path) -> str:
    if path.suffix.lower() in _NOT_TEXT:
        raise ConfigError(
            f"{path} is not a text file; give txt, jsonl or parquet, or leave it out of the pattern"
        )
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, or leave it out of the pattern"
        ) from error


def _not_a_text(path: Path, place: int, column: str, value: Any) -> str:
    return (
        f"{path}:{place}: column {column!r} holds {type(value).__name__}, not text; "
        "name the column of the text with `data.source.column`"
    )


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first part with a wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _nothing_there(full: Path) -> str:
    if full.is_dir():
        return f"no text in folder {full}; it must hold {', '.join(_IN_FOLDERS)} files"
    if glob.has_magic(str(full)):
        return (
            f"no file fits {full}; `**` goes through folders, and relative paths start at the experiment file"
        )
    return f"no such file or folder: {full}; relative paths start at the experiment file's folder"
