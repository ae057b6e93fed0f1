"""Multiple-choice questions: read from jsonl, tokenised, and their choices' log-likelihoods."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minitron_ray.core.errors import ConfigError
from minitron_ray.data.tokenizer import TextTokenizer
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.vocabulary import chunk_logits, chunks

_FORM = '{"context": text, "choices": [text, ...], "answer": number}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One line of the file. `contexts` and `choices` are (choices,); `answer` counts from 0."""

    origin: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Context and choice as token ids, int64 (tokens,); the choice starts at token `start`."""

    ids: NDArray
    start: int
    characters: int
    """Of the choice as written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question ready to run."""

    choices: tuple[Choice, ...]
    answer: int


def read_questions(path: Path, limit: int | None = None) -> list[Written]:
    """The questions of a file, at most `limit`. Raises ConfigError, with file and line, for a bad one."""
    questions: list[Written] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(questions) == limit:
                break
            if line.strip():
                questions.append(_question(f"{path}:{number}", line))
    if not questions:
        raise ConfigError(f"{path} holds no question; each line is {_FORM}")
    return questions


def _question(origin: str, line: bytes) -> Written:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{origin}: not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{origin}: {type(row).__name__} instead of an object; each line is {_FORM}")
    for name in ("context", "choices", "answer"):
        if name not in row:
            raise ConfigError(f"{origin}: no {name!r}; each line is {_FORM}")
    choices, answer = row["choices"], row["answer"]
    if not _texts(choices) or len(choices) < 2 or not all(choices):
        raise ConfigError(f"{origin}: 'choices' must be a list of at least two texts that are not empty")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{origin}: 'answer' is {answer!r}, must be the right choice's number, 0 to {len(choices) - 1}"
        )
    return Written(
        origin=origin,
        contexts=_contexts(origin, row["context"], len(choices)),
        choices=tuple(choices),
        answer=answer,
    )


def _contexts(origin: str, context: Any, choices: int) -> tuple[str, ...]:
    if isinstance(context, str):
        return (context,) * choices
    if not _texts(context) or len(context) != choices:
        raise ConfigError(
            f"{origin}: 'context' must be a text, or a list of one text for each of the {choices} choices"
        )
    return tuple(context)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def encode(
    questions: list[Written], tokenizer: TextTokenizer, positions: int | None = None
) -> tuple[Question, ...]:
    """Token ids of every question. Contexts too long for `positions` lose their beginning.

    A choice is what is left of the whole's tokens behind as many as the context alone has. Raises
    ConfigError, with file and line, for a choice that does not fit, or adds no token to its context.
    """
    pairs = [_joined(*pair) for question in questions for pair in _pairs(question)]
    # Without the separator that ends a document.
    contexts = [ids[:-1] for ids in tokenizer.encode([context for context, _ in pairs])]
    wholes = [ids[:-1] for ids in tokenizer.encode([context + choice for context, choice in pairs])]
    rows = iter(zip(contexts, wholes, strict=True))
    encoded = []
    for question in questions:
        choices = [
            _choice(question.origin, *next(rows), text, tokenizer.separator, positions)
            for text in question.choices
        ]
        encoded.append(Question(choices=tuple(choices), answer=question.answer))
    return tuple(encoded)


def _pairs(question: Written) -> zip[tuple[str, str]]:
    return zip(question.contexts, question.choices, strict=True)


def _joined(context: str, choice: str) -> tuple[str, str]:
    """With the space between them in the choice, as tokenizers expect it before a word."""
    bare = context.rstrip()
    gap = context[len(bare) :]
    if not gap and bare and not choice[:1].isspace():
        gap = " "
    return bare, gap + choice


def _choice(
    origin: str, context: NDArray, whole: NDArray, text: str, separator: int, positions: int | None
) -> Choice:
    if not len(context):  # the first token too must be predicted from something
        context, whole = np.asarray([separator]), np.asarray([separator, *whole])
    added = len(whole) - len(context)
    if added < 1:
        raise ConfigError(f"{origin}: the choice {text!r} adds no token to its context; write it out")
    if positions is not None and added >= positions:
        raise ConfigError(
            f"{origin}: a choice has {added} tokens, the teacher reads {positions} at once with its context"
        )
    ids = whole if positions is None else whole[-positions:]
    return Choice(ids=ids, start=len(ids) - added, characters=len(text))


def context_length(folder: Path) -> int | None:
    """How many tokens the model in `folder` reads at once, None where its config does not say."""
    config = Checkpoint(folder).config
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def log_likelihoods(
    hidden: Tensor,
    ids: NDArray,
    starts: NDArray,
    stops: NDArray,
    head: Tensor,
    softcap: float | None = None,
) -> NDArray:
    """Sum over the tokens `starts` to `stops` of each row of their log-probabilities, float64 (rows,).

    `hidden` (rows, tokens, hidden) are the final hidden states of `ids`. The head is applied at the
    positions before those tokens only.
    """
    rows = np.repeat(np.arange(len(ids)), stops - starts)
    columns = np.concatenate([np.arange(*span) for span in zip(starts, stops, strict=True)])
    labels = torch.from_numpy(ids[rows, columns]).to(hidden.device)
    chosen = hidden[torch.from_numpy(rows), torch.from_numpy(columns - 1)]
    sums = np.zeros(len(ids))
    for part in chunks(len(chosen), len(head), chosen.device):
        log_probabilities = chunk_logits(chosen[part], head, softcap).log_softmax(-1)
        found = log_probabilities.gather(-1, labels[part, None]).squeeze(-1)
        np.add.at(sums, rows[part], found.double().cpu().numpy())
    return sums
