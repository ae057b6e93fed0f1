"""Downstream tasks against the model's own logits, and every way a file of questions can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from minitron_ray.core.errors import ConfigError
from minitron_ray.data.tokenizer import TextTokenizer, load_tokenizer
from minitron_ray.evaluation.questions import Written, encode
from minitron_ray.evaluation.task import Material, Sequences, Task
from minitron_ray.evaluation.tasks.accuracy import Accuracy
from minitron_ray.evaluation.tasks.multiple_choice import MultipleChoice, Normalisation
from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.layerwise import Layerwise
from minitron_ray.weights.model import build

ROWS: list[dict[str, Any]] = [
    {"context": "The model keeps", "choices": ["a head", "its neighbour after a while", "no"], "answer": 0},
    {"context": "A student learns ", "choices": ["the next token", "nothing"], "answer": 1},
    {
        "context": ["This run returns the loss", "This run returns no answer"],
        "choices": [" again."] * 2,
        "answer": 1,
    },
    {"context": "", "choices": ["One worker", "most neurons, then"], "answer": 0},
    {"context": "The cluster", "choices": ["repeats a short text"] * 2 + ["forgets"], "answer": 2},
]


def write(folder: Path, *lines: str) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path, *(json.dumps(row) for row in ROWS), "")


def material(teacher: Path, base: Path, ids: NDArray | None = None) -> Material:
    ids = np.zeros((1, 8), dtype=np.int64) if ids is None else ids
    calibration = Sequences(read=ids.__getitem__, indices=tuple(range(len(ids))))
    return Material(calibration=calibration, teacher=teacher, base=base)


def values(task: Task, network: Layerwise, given: Material, size: int) -> NDArray:
    examples = task.examples(given)
    found = []
    for start in range(0, len(examples), size):
        batch = examples.batch(start, min(start + size, len(examples)))
        state = network.start(torch.from_numpy(batch.ids))
        hidden = state.hidden
        for layer in range(network.layers):
            hidden = network.apply(layer, hidden, state)
        found.append(task.values(network.finish(hidden), batch, network.head, network.softcap))
    return np.concatenate(found)


@pytest.fixture(scope="module")
def network(tiny_llama: Path) -> Layerwise:
    checkpoint = Checkpoint(tiny_llama)
    return Layerwise(build(checkpoint.config, checkpoint), family_of(checkpoint.config))


def test_accuracy_is_the_share_of_right_guesses(network: Layerwise, tiny_llama: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (5, 40))
    found = values(Accuracy(), network, material(tiny_llama, tmp_path, ids), 2)
    guesses = network.model(input_ids=torch.from_numpy(ids)).logits[:, :-1].argmax(-1).numpy()
    np.testing.assert_array_equal(found, (guesses == ids[:, 1:]).mean(1))
    right = np.concatenate([ids[:, :-1], guesses[:, -1:]], axis=1)  # the last token is right now
    better = values(Accuracy(), network, material(tiny_llama, tmp_path, right), 5)
    assert (better >= found).all() and better.sum() > found.sum()


def log_likelihood(network: Layerwise, folder: Path, context: str, choice: str) -> tuple[float, int]:
    """Of a choice, token by token from the model's logits; and how many tokens it has."""
    tokenizer = load_tokenizer(folder)
    bare = context.rstrip()
    gap = context[len(bare) :] or ("" if not bare or choice.startswith(" ") else " ")
    before, whole = (list(ids[:-1]) for ids in tokenizer.encode([bare, bare + gap + choice]))
    if not before:
        before, whole = [tokenizer.separator], [tokenizer.separator, *whole]
    logits = network.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    total = sum(float(logits[place - 1, whole[place]]) for place in range(len(before), len(whole)))
    return total, len(whole) - len(before)


@pytest.mark.parametrize("normalise", ["none", "characters", "tokens"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_likeliest_choice_is_taken(
    network: Layerwise, tiny_llama: Path, questions: Path, normalise: Normalisation, size: int
) -> None:
    task = MultipleChoice(path=questions.name, normalise=normalise)
    found = values(task, network, material(tiny_llama, questions.parent), size)
    expected = []
    for row in ROWS:
        contexts = (
            row["context"] if isinstance(row["context"], list) else [row["context"]] * len(row["choices"])
        )
        scores = []
        for context, choice in zip(contexts, row["choices"], strict=True):
            score, tokens = log_likelihood(network, tiny_llama, context, choice)
            scores.append(score / {"none": 1, "characters": len(choice), "tokens": tokens}[normalise])
        expected.append(float(np.argmax(scores) == row["answer"]))
    assert list(found) == expected


def test_unless_normalised_a_short_choice_beats_a_long_one(
    network: Layerwise, tiny_llama: Path, tmp_path: Path
) -> None:
    short, long = ("e", "each " * 12)
    path = write(tmp_path, json.dumps({"context": "The loss", "choices": [short, long], "answer": 0}))
    task = MultipleChoice(path=path.name, normalise="none")
    assert values(task, network, material(tiny_llama, tmp_path), 1)[0] == 1


def test_a_limit_takes_the_first_questions(tiny_llama: Path, questions: Path) -> None:
    task = MultipleChoice(path=str(questions), limit=2)
    examples = task.examples(material(tiny_llama, Path("/nowhere")))
    assert len(examples) == 2 and len(examples.batch(0, 2).ids) == 5
    assert task.label == f"multiple_choice({questions}, normalise=characters)"


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    task, one = MultipleChoice(path="questions.jsonl"), json.dumps(ROWS[0])
    write(tmp_path, one)
    first = task.inputs(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write(other, one)
    assert task.inputs(other) == first
    write(other, one, one)
    assert task.inputs(other) != first
    assert Accuracy().inputs(tmp_path) == {}


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"questions\.jsonl:2: not a line of JSON"),
        ("[1]", r"questions\.jsonl:2: list instead of an object; each line is"),
        ('{"context": "x", "choices": ["a", "b"]}', r"questions\.jsonl:2: no 'answer'; each line is"),
        ('{"choices": ["a", "b"], "answer": 0}', r":2: no 'context'"),
        ('{"context": "x", "choices": ["a"], "answer": 0}', r":2: 'choices' must be a list of at least two"),
        ('{"context": "x", "choices": ["a", ""], "answer": 0}', r":2: .* not empty"),
        ('{"context": "x", "choices": "ab", "answer": 0}', r":2: 'choices' must be a list"),
        ('{"context": "x", "choices": ["a", "b"], "answer": 2}', r":2: 'answer' is 2, must be .* 0 to 1"),
        ('{"context": "x", "choices": ["a", "b"], "answer": "1"}', r":2: 'answer' is '1'"),
        ('{"context": "x", "choices": ["a", "b"], "answer": true}', r":2: 'answer' is True"),
        ('{"context": ["x"], "choices": ["a", "b"], "answer": 0}', r":2: 'context' must be .* each of the 2"),
        ('{"context": 3, "choices": ["a", "b"], "answer": 0}', r":2: 'context' must be a text"),
        (
            json.dumps({"context": "x", "choices": ["a", "no " * 600], "answer": 0}),
            r":2: a choice has \d+ tokens, the teacher reads 512 at once",
        ),
    ],
)
def test_a_bad_line_is_named(tiny_llama: Path, tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, GOOD, line)
    with pytest.raises(ConfigError, match=message):
        MultipleChoice(path="questions.jsonl").examples(material(tiny_llama, tmp_path))


def test_a_file_without_questions_or_no_file_at_all(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, "", "")
    with pytest.raises(ConfigError, match="holds no question; each line is"):
        MultipleChoice(path="questions.jsonl").examples(material(tiny_llama, tmp_path))
    with pytest.raises(
        ConfigError, match=r"no such file: .*absent\.jsonl; .*relative to the experiment file"
    ):
        MultipleChoice(path="absent.jsonl").inputs(tmp_path)


def test_a_choice_that_the_tokenizer_drops_is_named() -> None:
    words = Tokenizer(WordLevel({"end": 0, "yes": 1, "x": 2}, unk_token="end"))
    words.pre_tokenizer = WhitespaceSplit()
    row = Written(origin="x.jsonl:7", contexts=("x", "x"), choices=("yes", " "), answer=0)
    with pytest.raises(ConfigError, match=r"x\.jsonl:7: the choice ' ' adds no token to its context"):
        encode([row], TextTokenizer(backend=words, separator=0, vocabulary=3))


def test_a_long_context_loses_its_beginning(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    row = Written(
        origin="x:1", contexts=("The model keeps a head. " * 9,), choices=("Then it stops.",), answer=0
    )
    (whole,), (cut,) = (encode([row], tokenizer, positions)[0].choices for positions in (None, 32))
    assert len(cut.ids) == 32 and len(whole.ids) > 32
    np.testing.assert_array_equal(cut.ids, whole.ids[-32:])
    np.testing.assert_array_equal(cut.ids[cut.start :], whole.ids[whole.start :])
