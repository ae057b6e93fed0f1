"""A data set of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from minitron_ray.data.source import Shard, TextSource

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

    @property
    def title(self) -> str:
        return self.path if self.name is None else f"{self.path} {self.name}"

    @property
    def bounded(self) -> bool:
        return True

    def shards(self, base: Path, cache: Cache) -> Iterator[Shard]:
        from minitron_ray.data.hub import HubSplit

        return HubSplit(
            path=self.path, name=self.name, split=self.split, revision=self.revision, column=self.column
        ).shards()

    def identity(self, base: Path, cache: Cache) -> dict[str, Any]:
        """The names themselves: a commit fixes the content."""
        return self.model_dump(mode="json", exclude={"kind"})
