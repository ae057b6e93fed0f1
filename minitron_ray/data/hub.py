"""Rows of a data set of the Hugging Face hub, streamed: only what is read is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from logging import CRITICAL
from pathlib import Path
from typing import Any

from minitron_ray.core.errors import ConfigError, EnvironmentFailure
from minitron_ray.data.source import Document
from minitron_ray.data.tokenizer import quiet


def stream_rows(path: str, name: str | None, split: str, revision: str, column: str) -> Iterator[Document]:
    """The texts of one split in its own order.

    Raises ConfigError for an unknown configuration, split or column, EnvironmentFailure where the hub
    can't be reached. Without a network, a data set in the local cache of `datasets` is used.
    """
    import datasets
    from huggingface_hub import constants

    if Path(path).exists():  # `datasets` would read it instead of the hub's, whatever the revision
        raise ConfigError(
            f"a local folder is named {path} like the data set; use `kind: files` or run elsewhere"
        )
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(CRITICAL)
    where = f"{path} ({name or 'default'}, {split})"
    try:
        with quiet():
            rows = datasets.load_dataset(
                path, name, split=split, revision=revision, streaming=not constants.HF_HUB_OFFLINE
            )
            yield from documents_of(rows, column, where)
    except ValueError as error:  # unknown configuration, split, or nothing cached while offline
        if constants.HF_HUB_OFFLINE:
            raise _unreachable(where, error) from error
        raise ConfigError(f"data set {where}: {_line(error)}") from error
    except OSError as error:  # not found, no network, no permission
        raise _unreachable(where, error) from error


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
