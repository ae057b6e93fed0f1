"""`TextTokenizer`: a model folder's fast tokenizer, as packing needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.fingerprint import digest, file_sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SOURCE: Final = "source.json"
"""What a converted model folder says about itself; `document_separator` is a token id."""
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "sentencepiece.model",
)
_PATTERNS: Final = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "added_tokens.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokenizer:
    """`separator` is the id that ends a document, `padding` that which fills rows up (None where they are the same, or
    there is none), `vocabulary` the number of rows of the embedding."""

    backend: Tokenizer
    separator: int
    vocabulary: int
    padding: int | None = None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text's token ids and the separator, int64; no other special token is added."""
        # Without a say in it, `tokenizers` warns on stderr whenever a process that used its threads forks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray([*encoding.ids, self.separator], dtype=np.int64) for encoding in encodings]


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a model folder. Raises ConfigError where it has no fast one or no end-of-text."""
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a damaged file makes the library raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(f"the tokenizer in {folder} can't be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer in {folder} is not a fast one; add its tokenizer.json")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may carry both from its training
    backend.no_padding()
    separator = _first(_json(folder / SOURCE).get("document_separator"))
    for found in (tokenizer.eos_token_id, *_declared_ends(folder)):
        separator = _first(found) if separator is None else separator
    if separator is None:
        raise ConfigError(f"the tokenizer in {folder} names no eos_token, which must end each document")
    vocabulary = _json(folder / "config.json").get("vocab_size") or len(tokenizer)
    padding = _first(tokenizer.pad_token_id)
    return TextTokenizer(
        backend=backend,
        separator=separator,
        vocabulary=vocabulary,
        padding=None if padding == separator else padding,
    )


def tokenizer_digest(folder: Path) -> str:
    """sha256 of all that decides what `load_tokenizer` makes of a text; costs no heavy import."""
    files = {path.name: path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    said = [_json(folder / SOURCE).get("document_separator"), *_declared_ends(folder)]
    size = _json(folder / "config.json").get("vocab_size")
    return digest([{name: file_sha256(path) for name, path in sorted(files.items())}, said, size])


def check_tokenizer(folder: Path) -> None:
    """Raises ConfigError for a folder without tokenizer files."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{folder} holds no tokenizer; copy the model's tokenizer.json and tokenizer_config.json"
        )


def check_same_tokenizer(teacher: Path, start: Path, names: tuple[str, str]) -> None:
    """Raises ConfigError where two model folders' tokenizers give a text other ids, or ids that one of the
    models has no row for; `names` is what to call the teacher and the model to cut. Special tokens that were
    added to either do not count, and how many rows the embeddings are padded to does not either."""
    if tokenizer_digest(teacher) == tokenizer_digest(start):
        return
    loaded = [load_tokenizer(folder) for folder in (teacher, start)]
    theirs, own = (one.backend.get_vocab(with_added_tokens=False) for one in loaded)
    if theirs == own:
        _check_rows(loaded[0], loaded[1], names)
        return
    token = min(set(theirs.items()) ^ set(own.items()), key=lambda item: (item[1], item[0]))[0]
    raise ConfigError(
        f"start: the tokenizer of {names[1]} ({len(own):,} tokens) is not that of the teacher {names[0]} "
        f"({len(theirs):,} tokens): {token!r} is {_numbered(own, token)} in it, and {_numbered(theirs, token)} in the "
        "teacher's; start from a model with the teacher's tokenizer"
    )


def _check_rows(teacher: TextTokenizer, start: TextTokenizer, names: tuple[str, str]) -> None:
    """The teacher's tokenizer makes the ids: each must have a row in both embeddings."""
    ids = teacher.backend.get_vocab(with_added_tokens=True)
    token = max(ids, key=lambda token: ids[token])
    if ids[token] >= start.vocabulary:
        raise ConfigError(
            f"start: {names[1]} has {start.vocabulary:,} rows in its embedding, none for {token!r}, id {ids[token]} "
            f"of the tokenizer of the teacher {names[0]} ({teacher.vocabulary:,} rows); start from a model with the "
            "teacher's tokenizer"
        )


def _numbered(vocabulary: dict[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "no token"


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and huggingface_hub say nothing and draw no bars inside the block."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    loggers = (logging, hub.logging)
    before = [logger.get_verbosity() for logger in loggers]
    bars, hub_bars = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    for logger in loggers:
        logger.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()


def _declared_ends(folder: Path) -> list[Any]:
    return [_json(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]


def _first(value: Any) -> int | None:
    """The id, or the first of several (models that end turns in more than one way list them)."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as JSON: {error}") from error
    return value if isinstance(value, dict) else {}
