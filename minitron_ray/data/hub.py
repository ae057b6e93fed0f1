"""Rows of a data set of the Hugging Face hub, streamed: only what is read is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

from minitron_ray.core.errors import ConfigError, EnvironmentFailure
from minitron_ray.data.source import Document, Shard
from minitron_ray.data.tokenizer import quiet


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSplit:
    """A split of a data set at a commit, and the column of its texts."""

    path: str
    name: str | None
    split: str
    revision: str
    column: str

    def __str__(self) -> str:
        return f"{self.path} ({self.name or 'default'}, {self.split})"

    def shards(self) -> Iterator[HubShard]:
        """The split file by file, in its own order. Raises as `HubShard.documents`."""
        with self._reading():
            files = getattr(self._rows(), "num_shards", 1)  # what is not streamed is one
        for index in range(files):
            yield HubShard(of=self, index=index, files=files)

    def documents(self, index: int, files: int) -> Iterator[Document]:
        """The texts of one of its files."""
        with self._reading():
            rows, where = self._rows(), str(self)
            if files > 1:
                rows, where = rows.shard(num_shards=files, index=index), f"{self} file {index + 1}"
            yield from documents_of(rows, self.column, where)

    def _rows(self) -> Any:
        import datasets
        from huggingface_hub import constants

        if Path(self.path).exists():  # `datasets` would read it instead of the hub's, whatever the revision
            raise ConfigError(
                f"a local folder is named {self.path} like the data set; use `kind: files` or run elsewhere"
            )
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(CRITICAL)
        streaming = not constants.HF_HUB_OFFLINE
        return datasets.load_dataset(
            self.path, self.name, split=self.split, revision=self.revision, streaming=streaming
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Quiet, and any failure in one line."""
        from huggingface_hub import constants

        try:
            with quiet():
                yield
        except ValueError as error:  # unknown configuration, split, or nothing cached while offline
            if constants.HF_HUB_OFFLINE:
                raise _unreachable(str(self), error) from error
            raise ConfigError(f"data set {self}: {_line(error)}") from error
        except OSError as error:  # not found, no network, no permission
            raise _unreachable(str(self), error) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class HubShard(Shard):
    """One file of a split; all of it where `files` is 1."""

    of: HubSplit
    index: int
    files: int

    @property
    def identity(self) -> Any:
        return [self.index, self.files]

    @property
    def size(self) -> None:
        return None

    def documents(self) -> Iterator[Document]:
        """Raises ConfigError for an unknown configuration, split or column, EnvironmentFailure where the hub
        can't be reached. Without a network, a data set in the local cache of `datasets` is used."""
        return self.of.documents(self.index, self.files)


def documents_of(rows: Iterable[dict[str, Any]], column: str, where: str) -> Iterator[Document]:
    """The texts of rows. Raises ConfigError where the column is missing or holds no text."""
    for index, row in enumerate(rows, start=1):
        if column not in row:
            raise ConfigError(
                f"data set {where} has no column {column!r} (found: {', '.join(sorted(row))}); "
                "name it with `data.source.column`"
            )
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"data set {where}: column {column!r} holds {type(text).__name__}, not text")
        if text and text.strip():
            yield Document(text=text, origin=f"{where}:{index}")


def _unreachable(where: str, error: Exception) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"data set {where} can't be read from the hub: {_line(error)}; check the id, the network, HF_TOKEN "
        "and HF_HUB_OFFLINE, or use `kind: files` or `kind: pypi`"
    )


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
