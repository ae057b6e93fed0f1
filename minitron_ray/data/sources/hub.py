"""A data set of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from minitron_ray.data.source import Document, TextSource

if TYPE_CHECKING:
    from pathlib import Path

    from minitron_ray.results.cache import Cache


class Hub(TextSource):
    """Rows of one split, pinned to a commit so that the same experiment reads the same text."""

    kind: Literal["hub"] = "hub"
    path: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
    """Id of the data set, `owner/name`."""
    name: str | None = None
    """Configuration of the data set, such as `sample-10BT`."""
    split: Annotated[str, Field(min_length=1)] = "train"
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """Commit of the data set."""
    column: Annotated[str, Field(min_length=1)] = "text"

    def documents(self, base: Path, cache: Cache) -> Iterator[Document]:
        from minitron_ray.data.hub import stream_rows

        return stream_rows(self.path, self.name, self.split, self.revision, self.column)

    def identity(self, base: Path, cache: Cache) -> dict[str, Any]:
        """The names themselves: a commit fixes the content."""
        return self.model_dump(mode="json", exclude={"kind"})
