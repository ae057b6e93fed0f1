"""Text files of this machine or of an object store: txt, jsonl, parquet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from minitron_ray.data.source import Shard, TextSource

if TYPE_CHECKING:
    from pathlib import Path

    from minitron_ray.results.cache import Cache


class Files(TextSource):
    """A file, a folder or a pattern such as `texts/**/*.txt`, relative to the experiment file; or an address
    such as `s3://bucket/texts/**/*.parquet`, of which only what a run needs is read."""

    kind: Literal["files"] = "files"
    path: Annotated[str, Field(min_length=1)]
    column: Annotated[str, Field(min_length=1)] = "text"
    """Where the text is in a row of jsonl or parquet."""

    @field_validator("path")
    @classmethod
    def _can_be_read(cls, value: str) -> str:
        if "://" in value:
            from minitron_ray.data.storage import check_address

            check_address(value)
        return value

    @property
    def title(self) -> str:
        """Without an address's options."""
        return self.path.partition("?")[0] if self.bounded else self.path

    @property
    def bounded(self) -> bool:
        return "://" in self.path

    @property
    def by_content(self) -> bool:
        return "://" not in self.path

    def shards(self, base: Path, cache: Cache) -> Iterator[Shard]:
        from minitron_ray.data.reading import file_shards, find_files

        return file_shards(find_files(self.path, base), self.column)

    def identity(self, base: Path, cache: Cache) -> dict[str, Any]:
        from minitron_ray.data.reading import content_digest, find_files, listing_digest

        files = find_files(self.path, base)
        if self.by_content:
            return {"content": content_digest(files, cache), "column": self.column}
        return {"listing": listing_digest(files), "column": self.column}
