"""Text files inside a package of a Python package index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from minitron_ray.data.location import parse_pypi
from minitron_ray.data.source import Shard, TextSource

if TYPE_CHECKING:
    from pathlib import Path

    from minitron_ray.data.storage import StoredFile
    from minitron_ray.results.cache import Cache


class Pypi(TextSource):
    """Files of a wheel or source distribution, such as `pypi://django==5.2.19/docs/**/*.txt`."""

    kind: Literal["pypi"] = "pypi"
    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Expected digest of the file, or of the whole archive where `path` is a pattern."""
    column: Annotated[str, Field(min_length=1)] = "text"

    @field_validator("path")
    @classmethod
    def _is_a_location(cls, value: str) -> str:
        parse_pypi(value)
        return value

    @property
    def title(self) -> str:
        return self.path

    def shards(self, base: Path, cache: Cache) -> Iterator[Shard]:
        from minitron_ray.data.reading import file_shards

        return file_shards(self._files(cache), self.column)

    def identity(self, base: Path, cache: Cache) -> dict[str, Any]:
        from minitron_ray.data.reading import content_digest

        return {"content": content_digest(self._files(cache), cache), "column": self.column}

    def _files(self, cache: Cache) -> dict[str, StoredFile]:
        from minitron_ray.data.fetch import fetch_package
        from minitron_ray.data.storage import local_file

        package = fetch_package(parse_pypi(self.path), cache, sha256=self.sha256)
        return {name: local_file(path) for name, path in package.files().items()}
