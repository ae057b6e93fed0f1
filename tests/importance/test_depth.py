"""Removal metrics: without layers in one shared pass is as good as cutting the layers and measuring."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from minitron_ray.core.errors import ConfigError, MinitronError
from minitron_ray.evaluation.measure import measure
from minitron_ray.evaluation.task import Batch, Material, Sequences
from minitron_ray.evaluation.tasks.accuracy import Accuracy
from minitron_ray.importance.depth.logit_mse import LogitMSE
from minitron_ray.importance.depth.perplexity import Perplexity
from minitron_ray.importance.depth.task import OnTask
from minitron_ray.importance.metric import RemovalMetric
from minitron_ray.importance.removal import Removed, removal_values, score_layers
from minitron_ray.models.families import family_of
from minitron_ray.models.kept import Kept
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.layerwise import Layerwise, StreamedLayerwise
from minitron_ray.weights.model import build
from minitron_ray.weights.surgery import cut
from tests.contracts.networks import CONFIGS

LAYERS = 4
SINGLES: list[Removed] = [(layer,) for layer in range(LAYERS)]
METRICS: list[RemovalMetric] = [Perplexity(), LogitMSE(), LogitMSE(normalised=True), OnTask(task=Accuracy())]


@dataclass(frozen=True)
class Teacher:
    """The tiny Llama, and sequences drawn from its own distribution: whatever is removed, its loss rises."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    ids: NDArray

    @property
    def config(self) -> dict[str, Any]:
        return Checkpoint(self.folder).config

    def network(self) -> Layerwise:
        return Layerwise(build(self.config, self.tensors), family_of(self.config))

    def batches(self, size: int = 4, separator: int | None = None) -> list[Batch]:
        rows = (self.ids[start : start + size] for start in range(0, len(self.ids), size))
        return [Batch(ids=ids, separator=separator) for ids in rows]

    def without(self, removed: Sequence[int]) -> Any:
        """The model that `cut` makes of the other layers."""
        family = family_of(self.config)
        arch = family.read(self.config)
        left = tuple(layer for layer in range(LAYERS) if layer not in removed)
        kept = replace(
            Kept.whole(arch),
            layers=left,
            heads=(tuple(range(arch.heads)),) * len(left),
            mlp=(tuple(range(arch.mlp)),) * len(left),
        )
        student = cut(self.tensors, family, arch, kept)
        return build(family.student_config(self.config, kept.architecture(arch), kept), student)

    def losses_without(self, removed: Sequence[int], separator: int | None = None) -> NDArray:
        measured = measure(
            Headless(self.without(removed), separator),
            self.ids,
            range(len(self.ids)),
            dtype=torch.float32,
            device=torch.device("cpu"),
            batch=4,
            separator=separator,
        )
        return measured.losses

    def logits_without(self, removed: Sequence[int]) -> NDArray:
        with torch.no_grad():
            return self.without(removed)(input_ids=torch.from_numpy(self.ids)).logits.double().numpy()


@pytest.fixture(scope="module")
def teacher(tiny_llama: Path) -> Teacher:
    checkpoint = Checkpoint(tiny_llama)
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}
    model = build(checkpoint.config, tensors)
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (10, 1), generator=source)
    with torch.no_grad():
        for _ in range(23):
            chances = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=source)], dim=1)
    return Teacher(tiny_llama, tensors, ids.numpy())


def test_the_loss_without_layers_is_that_of_the_cut_model(teacher: Teacher) -> None:
    removals: list[Removed] = [(), *SINGLES, (0, 1), (1, 2, 3), (0, 2), (1, 3)]
    values = removal_values(teacher.network(), teacher.batches(), Perplexity(), removals)
    expected = np.stack([teacher.losses_without(removed) for removed in [(), *removals]])
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_documents_are_apart_with_and_without_layers(teacher: Teacher) -> None:
    separator = int(teacher.ids[0, 9])
    batches = teacher.batches(separator=separator)
    values = removal_values(teacher.network(), batches, Perplexity(), SINGLES)
    expected = np.stack([teacher.losses_without(removed, separator) for removed in ((), *SINGLES)])
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    guesses = removal_values(teacher.network(), batches, OnTask(task=Accuracy()), SINGLES)
    model, row = teacher.without((1,)), teacher.ids[0]
    right: list[bool] = []
    for part in np.split(row, np.flatnonzero(row == separator) + 1):
        if len(part) > 1:
            found = model(input_ids=torch.from_numpy(part)[None]).logits[0, :-1].argmax(-1).numpy()
            right += (found == part[1:]).tolist()
    assert len(right) < len(row) - 1
    assert guesses[2, 0] == np.mean(right)


def test_scores_are_what_the_layers_are_worth(teacher: Teacher) -> None:
    values = removal_values(teacher.network(), teacher.batches(), Perplexity(), SINGLES)
    scores = Perplexity().reduce(values)
    perplexities = [np.exp(teacher.losses_without(removed).mean()) for removed in ((), *SINGLES)]
    np.testing.assert_allclose(np.exp(scores), np.asarray(perplexities[1:]) / perplexities[0], rtol=1e-5)
    assert (scores > 0).all()


def test_logit_mse_is_that_of_whole_logits(teacher: Teacher) -> None:
    whole = teacher.logits_without(())
    expected = [np.square(teacher.logits_without(removed) - whole).mean() for removed in SINGLES]
    values = removal_values(teacher.network(), teacher.batches(), LogitMSE(), SINGLES)
    np.testing.assert_allclose(LogitMSE().reduce(values), expected, rtol=1e-5)
    normalised = LogitMSE(normalised=True).reduce(values)
    np.testing.assert_allclose(normalised, expected / np.square(whole).mean(), rtol=1e-5)


def test_accuracy_falls_by_the_predictions_that_go_wrong(teacher: Teacher) -> None:
    metric, labels = OnTask(task=Accuracy()), teacher.ids[:, 1:]
    values = removal_values(teacher.network(), teacher.batches(), metric, SINGLES)
    accuracies = [
        (teacher.logits_without(removed)[:, :-1].argmax(-1) == labels).mean() for removed in ((), *SINGLES)
    ]
    np.testing.assert_allclose(metric.reduce(values), accuracies[0] - np.asarray(accuracies[1:]), atol=1e-12)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.label)
def test_a_layer_that_does_nothing_is_worth_nothing(teacher: Teacher, metric: RemovalMetric) -> None:
    tensors = dict(teacher.tensors)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.2.{name}.weight"] = torch.zeros_like(tensors[f"model.layers.2.{name}.weight"])
    idle = replace(teacher, tensors=tensors)
    scores = metric.reduce(removal_values(idle.network(), idle.batches(), metric, SINGLES))
    assert scores[2] == 0
    if not isinstance(metric, OnTask):  # a guess may be right by chance
        assert (np.delete(scores, 2) > 0).all()


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.label)
def test_a_split_over_workers_does_not_show(teacher: Teacher, metric: RemovalMetric) -> None:
    batches = teacher.batches(2)
    whole = removal_values(teacher.network(), batches, metric, SINGLES)
    parts = [
        removal_values(teacher.network(), part, metric, SINGLES)
        for part in (batches[:1], batches[1:3], batches[3:])
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("held_bytes", [1, 40_000, 2**31])
def test_a_streamed_teacher_gives_the_same_values(teacher: Teacher, held_bytes: int) -> None:
    streamed = StreamedLayerwise(Checkpoint(teacher.folder), dtype=torch.float32, device="cpu")
    removals: list[Removed] = [*SINGLES, (1, 2)]
    done: list[int] = []
    values = removal_values(streamed, teacher.batches(), Perplexity(), removals, done.append, held_bytes)
    expected = removal_values(teacher.network(), teacher.batches(), Perplexity(), removals)
    np.testing.assert_array_equal(values, expected)
    assert done == [1, 2, 3]


def test_only_layers_behind_a_removed_one_are_computed(teacher: Teacher) -> None:
    network = teacher.network()
    calls = [0] * LAYERS

    def count(layer: int) -> Any:
        def hook(*_: Any) -> None:
            calls[layer] += 1

        return hook

    for layer in range(LAYERS):
        network.module(layer).register_forward_hook(count(layer))
    removal_values(network, teacher.batches(10), Perplexity(), SINGLES)
    # The whole network, and the networks without each of the layers before.
    assert calls == [1, 2, 3, 4] and sum(calls) == LAYERS * (LAYERS + 1) // 2


def measured(teacher: Teacher, metric: RemovalMetric, removals: Sequence[Removed]) -> NDArray:
    return removal_values(teacher.network(), teacher.batches(), metric, removals)


@pytest.mark.parametrize("fewest", [1, 2, 3, 4])
def test_removing_one_by_one_is_cutting_again_and_again(teacher: Teacher, fewest: int) -> None:
    metric = Perplexity(iterative=True)
    scores = score_layers(metric, LAYERS, fewest, lambda removals: measured(teacher, metric, removals))[1]
    gone: list[int] = []
    for _ in range(max(LAYERS - fewest, 1)):
        left = [layer for layer in range(LAYERS) if layer not in gone]
        losses = {layer: teacher.losses_without([*gone, layer]).mean() for layer in left}
        gone.append(min(losses, key=lambda layer: losses[layer]))
    order = [
        *gone,
        *(layer for layer in sorted(losses, key=lambda layer: losses[layer]) if layer not in gone),
    ]
    assert list(np.argsort(scores)) == order and sorted(scores) == [0, 1, 2, 3]


def test_blocks_are_scored_whole(teacher: Teacher) -> None:
    metric = Perplexity(blocks=(3, 2))
    scores = score_layers(metric, LAYERS, 1, lambda removals: measured(teacher, metric, removals))
    assert [len(scores[length]) for length in (1, 2, 3)] == [4, 3, 2] and set(scores) == {1, 2, 3}
    whole = teacher.losses_without(()).mean()
    for length, start in itertools.chain(((2, i) for i in range(3)), ((3, i) for i in range(2))):
        without = teacher.losses_without(range(start, start + length)).mean()
        assert scores[length][start] == pytest.approx(without - whole, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if family_of(CONFIGS[name]).softcap])
def test_capped_logits_are_the_models(name: str) -> None:
    config = CONFIGS[name]
    family = family_of(config)
    source = torch.Generator().manual_seed(0)
    shapes = family.shapes(family.read(config))
    model = build(config, {key: torch.randn(s, generator=source) * 0.3 for key, s in shapes.items()})
    ids = torch.arange(36).reshape(3, 12) * 5 % 61 + 2
    logits = model(input_ids=ids).logits
    network, batch = Layerwise(model, family), [Batch(ids=ids.numpy())]
    losses = removal_values(network, batch, Perplexity(), [])[0]
    expected = [cross_entropy(row[:-1], labels[1:]).item() for row, labels in zip(logits, ids, strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    squares = removal_values(network, batch, LogitMSE(), [])[0]
    np.testing.assert_allclose(squares, logits.square().mean((1, 2)), rtol=1e-5)


def test_metrics_run_on_the_calibration_sequences_and_tasks_on_their_own(teacher: Teacher) -> None:
    calibration = Sequences(read=teacher.ids.__getitem__, indices=(3, 1))
    material = Material(calibration=calibration, teacher=teacher.folder, base=Path())
    for metric in METRICS:
        examples = metric.examples(material)
        assert len(examples) == 2
        np.testing.assert_array_equal(examples.batch(1, 2).ids, teacher.ids[[1]])
        assert metric.inputs(Path()) == {}


def test_weights_that_are_not_finite_are_named(teacher: Teacher) -> None:
    tensors = dict(teacher.tensors)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * float("nan")
    broken = replace(teacher, tensors=tensors)
    with pytest.raises(MinitronError, match=r"loss of the whole teacher is not finite.*precision: float32"):
        measured(broken, Perplexity(), SINGLES)


def test_a_student_keeps_a_layer(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="all 4 layers would be removed; a student keeps at least one"):
        measured(teacher, Perplexity(), [(0, 1, 2, 3)])
    with pytest.raises(ValueError, match=r"layers \(4,\) cannot be removed from a network of 4"):
        measured(teacher, Perplexity(), [(4,)])
    metric = Perplexity(blocks=(2, 4))
    with pytest.raises(ConfigError, match="a block of 4 layers cannot go from a teacher of 4"):
        score_layers(metric, LAYERS, 1, lambda removals: measured(teacher, metric, removals))


def test_one_by_one_or_in_blocks() -> None:
    with pytest.raises(ValidationError, match="iterative removes layers one by one and blocks at once"):
        Perplexity(iterative=True, blocks=(2,))
