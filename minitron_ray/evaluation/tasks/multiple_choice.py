"""Questions with given answers, from a file: Winogrande, HellaSwag, ARC and the like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from minitron_ray.core.errors import ConfigError
from minitron_ray.evaluation.task import Batch, Material, Task

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from minitron_ray.evaluation.questions import Question

Normalisation = Literal["none", "characters", "tokens"]


class MultipleChoice(Task):
    """The share of questions whose right choice has the highest log-likelihood after its context.

    Each line of the file is `{"context": text, "choices": [text, ...], "answer": number}`, the answer
    counted from 0. `context` may be a list with one text a choice (Winogrande: the sentence with either
    name filled in, and the same rest of it as every choice). Context and choice are joined by a space
    where there is none.
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    path: Annotated[str, Field(min_length=1)]
    """A jsonl file, relative to the experiment file."""
    normalise: Normalisation = "characters"
    """What a choice's log-likelihood is divided by: its length in characters (as is usual for HellaSwag
    and ARC), in tokens, or nothing (Winogrande)."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """How many questions are taken, from the top of the file."""

    @property
    def label(self) -> str:
        return f"multiple_choice({self.path}, normalise={self.normalise})"

    def examples(self, material: Material) -> Questions:
        from minitron_ray.data.tokenizer import load_tokenizer
        from minitron_ray.evaluation.questions import context_length, encode, read_questions

        questions = read_questions(self.file(material.base), self.limit)
        positions = context_length(material.teacher)
        return Questions(encode(questions, load_tokenizer(material.teacher), positions), self.normalise)

    def values(self, hidden: Tensor, batch: Batch, head: Tensor, softcap: float | None = None) -> NDArray:
        from minitron_ray.evaluation.questions import log_likelihoods

        notes: Notes = batch.notes
        scores = log_likelihoods(hidden, batch.ids, notes.starts, notes.stops, head, softcap) / notes.lengths
        ends = np.cumsum(notes.choices)[:-1]
        chosen = [int(np.argmax(of_question)) for of_question in np.split(scores, ends)]
        return (np.asarray(chosen) == notes.answers).astype(np.float64)

    def inputs(self, base: Path) -> dict[str, Any]:
        from minitron_ray.core.fingerprint import file_sha256

        return {"content": file_sha256(self.file(base))}

    def file(self, base: Path) -> Path:
        """The named file. Raises ConfigError where it is not there."""
        from pathlib import Path

        full = base / Path(self.path).expanduser()
        if not full.is_file():
            raise ConfigError(
                f"no such file: {full}; `path` of a multiple_choice task names one jsonl file, relative to "
                "the experiment file"
            )
        return full


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """Of a batch's rows, one a choice: where the choice's tokens start and stop, and the length that its
    log-likelihood is divided by. Of its questions: how many choices, and which is right. All (n,)."""

    starts: NDArray
    stops: NDArray
    lengths: NDArray
    choices: NDArray
    answers: NDArray


@dataclass(frozen=True, slots=True)
class Questions:
    """Examples that are questions."""

    questions: tuple[Question, ...]
    normalise: Normalisation

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, start: int, stop: int) -> Batch:
        """One row a choice, filled up at its end, which causal attention does not look at."""
        taken = self.questions[start:stop]
        rows = [choice for question in taken for choice in question.choices]
        ids = np.zeros((len(rows), max(len(row.ids) for row in rows)), dtype=np.int64)
        for place, row in zip(ids, rows, strict=True):
            place[: len(row.ids)] = row.ids
        lengths = {
            "none": [1 for _ in rows],
            "characters": [row.characters for row in rows],
            "tokens": [len(row.ids) - row.start for row in rows],
        }
        return Batch(
            ids=ids,
            notes=Notes(
                starts=np.asarray([row.start for row in rows]),
                stops=np.asarray([len(row.ids) for row in rows]),
                lengths=np.asarray(lengths[self.normalise], dtype=np.float64),
                choices=np.asarray([len(question.choices) for question in taken]),
                answers=np.asarray([question.answer for question in taken]),
            ),
        )
