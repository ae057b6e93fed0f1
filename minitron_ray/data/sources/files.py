"""Text files of this machine: txt, jsonl, parquet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from minitron_ray.data.source import Document, TextSource

if TYPE_CHECKING:
    from pathlib import Path

    from minitron_ray.results.cache import Cache


class Files(TextSource):
    """A file, a folder or a pattern such as `texts/**/*.txt`; relative to the experiment file."""

    kind: Literal["files"] = "files"
    path: Annotated[str, Field(min_length=1)]
    column: Annotated[str, Field(min_length=1)] = "text"
    """Where the text is in a row of jsonl or parquet."""

    def documents(self, base: Path, cache: Cache) -> Iterator[Document]:
        from minitron_ray.data.reading import find_files, read_documents

        return read_documents(find_files(self.path, base), self.column)

    def identity(self, base: Path, cache: Cache) -> dict[str, Any]:
        from minitron_ray.data.reading import content_digest, find_files

        return {"content": content_digest(find_files(self.path, base)), "column": self.column}
