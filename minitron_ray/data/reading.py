"""Finding text files and reading documents out of them, in an order that mixes topics."""

from __future__ import annotations

import glob
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.fingerprint import digest, file_sha256
from minitron_ray.data.rows import JSONL, PARQUET, Span, read_rows, row_groups
from minitron_ray.data.source import Document, Shard
from minitron_ray.data.storage import StoredFile, find_stored, is_address, local_file

if TYPE_CHECKING:
    from minitron_ray.results.cache import Cache

SHARD: Final = 32 * 2**20
"""Bytes of a shard, about: a task of some ten seconds."""
LARGE: Final = 16 * 2**20
"""Bytes from which on a file is not hashed again where another one changed."""
_DIGESTS: Final = "digests"
_SETTLED_S: Final = 10.0
"""A file changed less long ago may change again within the same tick of its clock."""
_IN_FOLDERS: Final = (".txt", *JSONL, *PARQUET)
"""What is read of a folder; a pattern may name text files of any other suffix."""
_NOT_TEXT: Final = (".json", ".csv", ".tsv", ".arrow", ".npy", ".gz", ".bz2", ".xz", ".zst", ".zip")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A file, or a part of it."""

    place: int
    """Of the file, in the order in which they are read."""
    name: str
    """Relative, as documents are called by it."""
    file: StoredFile
    size: int
    """Bytes."""
    span: Span | None = None
    """None is all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileShard(Shard):
    """Pieces of files, one after another."""

    pieces: tuple[Piece, ...]
    column: str

    @property
    def identity(self) -> Any:
        # By place and not by name: the digest of local text is of its files' contents in that order.
        return [[piece.place, piece.span] for piece in self.pieces]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def documents(self) -> Iterator[Document]:
        for piece in self.pieces:
            yield from _documents(piece, self.column)


def find_files(path: str, base: Path) -> dict[str, StoredFile]:
    """The files of a path, a pattern or an address by their name relative to its fixed part.

    Raises ConfigError where there are none, EnvironmentFailure where a store can't be listed.
    """
    if is_address(path):
        found = find_stored(path, _IN_FOLDERS)
        if not found:
            raise ConfigError(
                f"no file fits {path}; `*` stays inside a folder, `**/` goes through all of them, and of a "
                f"folder {', '.join(_IN_FOLDERS)} are read"
            )
        return found
    pattern = Path(path).expanduser()
    full = base / pattern
    if full.is_file():
        return {full.name: local_file(full)}
    if full.is_dir():
        candidates = sorted(p for p in full.rglob("*") if p.is_file())
        files = {p.relative_to(full).as_posix(): local_file(p) for p in candidates}
        names = {name: file for name, file in files.items() if file.suffix in _IN_FOLDERS}
    else:
        root = base / _fixed_part(pattern)
        listed = glob.glob(str(pattern), root_dir=base, recursive=True)  # noqa: PTH207 - takes absolute ones too
        candidates = [base / name for name in sorted(listed)]
        names = {p.relative_to(root).as_posix(): local_file(p) for p in candidates if p.is_file()}
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


def in_order(files: Mapping[str, StoredFile]) -> list[tuple[str, StoredFile]]:
    """By sha256 of the name, so that every slice of the text mixes its folders."""
    return sorted(files.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def content_digest(files: Mapping[str, StoredFile], cache: Cache) -> str:
    """What the documents depend on: each file's bytes and format, in the order they are read. Local files; none
    of them is read where all are as they were when they were last hashed, by path, size and time."""
    ordered = [file for _, file in in_order(files)]

    def sha256(file: StoredFile) -> str:
        return file_digest(file, cache) if file.size >= LARGE else file_sha256(file.path)

    return _remembered(
        "text", ordered, cache, lambda: digest([[Path(f.path).suffix.lower(), sha256(f)] for f in ordered])
    )


def file_digest(file: StoredFile, cache: Cache) -> str:
    """sha256 of a local file's bytes. It is not read where it is as it was when it was hashed."""
    return _remembered("file", [file], cache, lambda: file_sha256(file.path))


def _remembered(what: str, files: Sequence[StoredFile], cache: Cache, make: Callable[[], str]) -> str:
    """What `make` gave when these files were last read."""
    if time.time() - max(file.modified for file in files) / 1e9 < _SETTLED_S:
        return make()

    def fill(folder: Path) -> None:
        (folder / "sha256").write_text(make(), encoding="ascii")

    seen = digest([what, [[f.path, str(Path(f.path).resolve()), f.size, f.modified] for f in files]])
    entry = cache.ensure(_DIGESTS, seen, {"bytes": sum(file.size for file in files)}, fill)
    return (entry / "sha256").read_text(encoding="ascii")


def listing_digest(files: Mapping[str, StoredFile]) -> str:
    """The names, sizes and times of stored files, in the order they are read."""
    return digest([[name, file.size, file.modified] for name, file in in_order(files)])


def file_shards(files: Mapping[str, StoredFile], column: str) -> Iterator[FileShard]:
    """Every text of every file that is not blank, in runs of about `SHARD` bytes. Raises ConfigError for
    what can't be read as text."""
    group: list[Piece] = []
    size = 0
    for place, (name, file) in enumerate(in_order(files)):
        for piece in _pieces(place, name, file, column):
            group.append(piece)
            size += piece.size
            if size >= SHARD:
                yield FileShard(pieces=tuple(group), column=column)
                group, size = [], 0
    if group:
        yield FileShard(pieces=tuple(group), column=column)


def _pieces(place: int, name: str, file: StoredFile, column: str) -> Iterator[Piece]:
    """Large files in pieces where lines or row groups allow."""
    if file.size <= SHARD or file.compression is not None or file.suffix not in (*JSONL, *PARQUET):
        yield Piece(place=place, name=name, file=file, size=file.size)
    elif file.suffix in JSONL:
        for start in range(0, file.size, SHARD):
            stop = min(start + SHARD, file.size)
            yield Piece(place=place, name=name, file=file, size=stop - start, span=(start, stop))
    else:
        first, size, sizes = 0, 0, row_groups(file, column)
        for number, of_group in enumerate(sizes, start=1):
            size += of_group
            if size >= SHARD or number == len(sizes):
                yield Piece(place=place, name=name, file=file, size=size, span=(first, number))
                first, size = number, 0


def _documents(piece: Piece, column: str) -> Iterator[Document]:
    file = piece.file
    if file.suffix in (*JSONL, *PARQUET) or _compressed_lines(file):
        yield from _texts_of_rows(piece, column)
    else:
        text = _whole_text(file)
        if text.strip():
            yield Document(text=text, origin=piece.name)


def _compressed_lines(file: StoredFile) -> bool:
    """`.json.gz` and the like: corpora are published so, with lines inside."""
    return file.compression is not None and file.suffix == ".json"


def _texts_of_rows(piece: Piece, column: str) -> Iterator[Document]:
    for place, value in read_rows(piece.file, column, piece.span):
        if value is not None and not isinstance(value, str):
            raise ConfigError(_not_a_text(piece.file, place, column, value))
        if value and value.strip():
            yield Document(text=_unicode(value), origin=f"{piece.name}:{place}")


def _unicode(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs, which JSON can write (`"\\ud83d"`) and no tokenizer takes:
    scraped text has them where it was cut."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _whole_text(file: StoredFile) -> str:
    if file.suffix in _NOT_TEXT:
        raise ConfigError(
            f"{file.where} is not a text file; give txt, jsonl or parquet, or leave it out of the pattern"
        )
    with file.open() as stream:
        content: bytes = stream.read()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file.where} is not UTF-8 (byte {error.start}); convert it, or leave it out of the pattern"
        ) from error


def _not_a_text(file: StoredFile, place: str, column: str, value: Any) -> str:
    return (
        f"{file.where}:{place}: column {column!r} holds {type(value).__name__}, not text; "
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
