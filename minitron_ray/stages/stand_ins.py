"""What stands in for models and text in a rehearsal: random weights of the same family, and a little of the
real text with the real tokenizer, or where these cannot be had made-up text and a tokenizer of bytes.

Whatever an experiment names is looked at as a run would: fetched, opened, checked; of text a little is read.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from minitron_ray.core.errors import ConfigError, MinitronError
from minitron_ray.core.fingerprint import digest
from minitron_ray.data.source import MixedSource, Source, TextSource, TokenSource
from minitron_ray.data.sources.files import Files
from minitron_ray.data.sources.tokens import Tokens
from minitron_ray.data.tokenizer import load_tokenizer, tokenizer_digest
from minitron_ray.experiment import Start, Teacher
from minitron_ray.models.families import family_of
from minitron_ray.plan import check_same_model
from minitron_ray.plan.miniature import Vocabulary
from minitron_ray.results.cache import Cache
from minitron_ray.weights.checkpoint import FLOATS, Checkpoint
from minitron_ray.weights.companions import copy_companions
from minitron_ray.weights.fetch import given_config, outline_of, read_config_only
from minitron_ray.weights.model import initialized, unstacked
from minitron_ray.weights.writing import write_checkpoint

MODELS, TEXT, TOKENIZER = "stand_in_models", "stand_in_text", "stand_in_tokenizers"
"""Kinds of cache entries."""
END: Final = "<|endoftext|>"
BYTES: Final = Vocabulary(size=320, end=256)
"""Of the tokenizer of bytes; a multiple of 64."""
_WORDS: Final = "the a small model learns from one that is large and of what it says keeps most".split()
_CHARACTERS_A_TOKEN: Final = 8
"""More than any tokenizer makes of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """A model that an experiment names, as far as it could be had."""

    config: dict[str, Any] | None
    folder: Path | None = None
    """Holds its tokenizer; None where it could not be had."""
    problem: str | None = None
    """Why not, in one line."""


def look_at_model(section: Teacher | Start, name: str, base: Path, cache: Cache) -> FoundModel:
    """The model of the section `name`: its folder opened and its tensors checked by their headers, of the hub
    all but the weights fetched. Where that fails, what its config says.

    Raises ConfigError where the config given for planning describes another model than the real one.
    """
    assert section.path is not None
    given = given_config(section.config, base, name)
    try:
        folder, whole = outline_of(section.path, section.revision, section.sha256, base, cache)
        checkpoint = Checkpoint(folder)
        if whole:
            family = family_of(checkpoint.config)
            checkpoint.check(family, family.read(checkpoint.config))
        load_tokenizer(folder)
    except MinitronError as error:
        problem = error.message if name in error.message else f"{name}.path: {error.message}"
        known = read_config_only(section.path, section.revision, section.config, base, cache)
        return FoundModel(config=known, problem=problem)
    if given is not None:
        check_same_model(given, checkpoint.config, name)
    return FoundModel(config=checkpoint.config, folder=folder)


def random_model(config: Mapping[str, Any], tokenizer: Path | None, seed: int, cache: Cache) -> Path:
    """The folder of a model of that config with random weights, and `tokenizer`'s or one of bytes."""
    companions = tokenizer or byte_tokenizer(cache)
    key = digest([dict(config), seed, tokenizer_digest(companions)])

    def fill(folder: Path) -> None:
        family = family_of(config)
        names = family.shapes(family.read(config))
        parameters = initialized(config, seed=seed).named_parameters(remove_duplicate=False)
        tensors = ((name, tensor) for name, tensor in unstacked(parameters, family) if name in names)
        stored = str(config.get("dtype") or config.get("torch_dtype"))
        kind = stored if stored in FLOATS.values() else "float32"
        write_checkpoint(folder, tensors, config, dtype=kind)
        copy_companions(companions, folder)

    return cache.ensure(MODELS, key, {"what": "random weights, for a rehearsal"}, fill).resolve()


def byte_tokenizer(cache: Cache) -> Path:
    """A folder with a fast tokenizer whose tokens are bytes."""

    def fill(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        alphabet = {sign: place for place, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END])
        assert backend.token_to_id(END) == BYTES.end
        backend.save(str(folder / "tokenizer.json"))
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END}
        (folder / "tokenizer_config.json").write_text(json.dumps(said))

    return cache.ensure(TOKENIZER, digest([END, BYTES.end]), {"what": "bytes as tokens"}, fill)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundText:
    """A little of a source of text, as a source of the same kind of thing in the cache."""

    source: Source
    problems: tuple[str, ...] = ()
    """Why it is made up, in one line for each source that could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Reads the beginning of sources: `rows` sequences of `length` tokens each."""

    base: Path
    real: Cache
    """Of the run: what is fetched here need not be fetched again."""
    cache: Cache
    """Of the rehearsal."""
    rows: int
    length: int
    vocabulary: int | None
    """Of a tokenizer that stands in, which ids of another have to fit; None with the real one."""

    def look_at(self, source: Source, name: str = "data.source") -> FoundText:
        """Reads a little of it."""
        if isinstance(source, MixedSource):
            return self._mixture(source, name)
        problems: tuple[str, ...] = ()
        try:
            if isinstance(source, TokenSource):
                return FoundText(source=self._tokens(source))
            assert isinstance(source, TextSource)
            texts = self._texts(source)
        except MinitronError as error:
            problems, texts = (f"{name}: {error.message}",), list(_made_up(self._characters))
        return FoundText(source=self._kept(texts), problems=problems)

    @property
    def _characters(self) -> int:
        return self.rows * self.length * _CHARACTERS_A_TOKEN

    def _mixture(self, source: MixedSource, name: str) -> FoundText:
        found = [
            self.look_at(one, f"{name}.parts[{place}].source") for place, one in enumerate(source.sources)
        ]
        parts = [{"weight": w, "source": f.source} for w, f in zip(source.weights, found, strict=True)]
        problems = tuple(problem for one in found for problem in one.problems)
        return FoundText(source=type(source)(parts=parts), problems=problems)  # type: ignore[call-arg]

    def _texts(self, source: TextSource) -> list[str]:
        """Documents from the first on, cut where they are enough; over again where they are too few."""
        found, size = [], 0
        for document in source.documents(self.base, self.real):
            found.append(document.text[: self._characters - size])
            size += len(found[-1])
            if size >= self._characters:
                return found
        if not found:
            raise ConfigError("there is no text in it")
        return found * -(-self._characters // size)

    def _kept(self, texts: list[str]) -> Source:
        def fill(folder: Path) -> None:
            lines = (json.dumps({"text": text}) + "\n" for text in texts)
            (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")

        folder = self.cache.ensure(TEXT, digest(texts), {"what": "a little text, for a rehearsal"}, fill)
        return Files(path=str(folder.resolve() / "text.jsonl"))

    def _tokens(self, source: TokenSource) -> Source:
        ids = _chained(source.sequences(self.base, self.real), self.rows * self.length)
        if self.vocabulary is not None:
            ids = ids % self.vocabulary
        rows = np.resize(ids, (self.rows, self.length))

        def fill(folder: Path) -> None:
            np.save(folder / "tokens.npy", rows)

        folder = self.cache.ensure(TEXT, digest(rows.tolist()), {"what": "a few tokens"}, fill)
        return Tokens(path=str(folder.resolve() / "tokens.npy"))


def _chained(rows: Iterable[np.ndarray], count: int) -> np.ndarray:
    """The first `count` ids of the rows, or all where they are fewer. Raises ConfigError for none."""
    found: list[np.ndarray] = []
    for row in rows:
        found.append(row)
        if sum(map(len, found)) >= count:
            break
    if not found:
        raise ConfigError("there are no tokens in it")
    return np.concatenate(found)[:count].astype(np.int64)


def _made_up(characters: int) -> Iterator[str]:
    """Documents of random words, the same every time."""
    draw = random.Random(0)
    size = 0
    for _ in itertools.count():
        text = " ".join(draw.choice(_WORDS) for _ in range(200))
        yield text
        size += len(text)
        if size >= characters:
            return
