"""Text that is tokenised already: parquet, arrow, jsonl or npy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from minitron_ray.data.source import TokenSource

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from minitron_ray.results.cache import Cache


class Tokens(TokenSource):
    """Rows of token ids, used as they stand and in file order, each of `sequence_length` tokens.

    Every token counts as text. Rows that are padded are refused, but for padding with the end-of-text token, which
    can't be told from the ends of documents: with `data.documents: apart` that is in no loss, but still in the scores
    of activations.
    """

    kind: Literal["tokens"] = "tokens"
    path: Annotated[str, Field(min_length=1)]
    """A file, relative to the experiment file."""
    column: Annotated[str, Field(min_length=1)] = "input_ids"
    """Where the ids are in a row; without meaning for npy."""

    @property
    def title(self) -> str:
        return self.path

    def sequences(self, base: Path, cache: Cache) -> Iterator[np.ndarray]:
        from minitron_ray.data.reading import find_tokens
        from minitron_ray.data.rows import read_token_rows

        return read_token_rows(find_tokens(self.path, base), self.column)

    def identity(self, base: Path, cache: Cache) -> dict[str, Any]:
        from minitron_ray.data.reading import file_digest, find_tokens
        from minitron_ray.data.storage import local_file

        return {
            "content": file_digest(local_file(find_tokens(self.path, base)), cache),
            "column": self.column,
        }
