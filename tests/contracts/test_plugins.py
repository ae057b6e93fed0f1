"""What every file of a plug-in folder must do, whatever its kind: one suite a folder."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from minitron_ray.core.fingerprint import digest
from minitron_ray.core.kinds import plugins
from minitron_ray.data.source import MixedSource, Source, TextSource, TokenSource
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.signal import Signal, StoredSignal
from minitron_ray.distillation.state_loss import StateLoss
from minitron_ray.distillation.targets import SparseTargets
from minitron_ray.evaluation.task import Batch, Material, Sequences, Task
from minitron_ray.importance.metric import (
    LayerMetric,
    ListeningLayerMetric,
    ListeningUnitMetric,
    RemovalMetric,
    StaticUnitMetric,
    UnitMetric,
)
from minitron_ray.importance.units import unit_shapes
from minitron_ray.models.families import family_of, supported
from minitron_ray.search.sampler import LearningSampler, OrderedSampler, SearchSampler
from minitron_ray.weights.checkpoint import Checkpoint

FOLDERS: dict[str, type[Any]] = {
    "minitron_ray.data.sources": Source,
    "minitron_ray.distillation.intermediate": StateLoss,
    "minitron_ray.distillation.losses": DistillationLoss,
    "minitron_ray.distillation.signals": Signal,
    "minitron_ray.importance.width": UnitMetric,
    "minitron_ray.importance.depth": LayerMetric,
    "minitron_ray.evaluation.tasks": Task,
    "minitron_ray.search.samplers": SearchSampler,
}


REQUIRED: dict[str, dict[str, Any]] = {
    "task": {"task": {"kind": "accuracy"}},
    "multiple_choice": {"path": "questions.jsonl"},
    "nsga2": {"against": "parameters"},
}
"""Fields without a default."""


def made(plugin: type[Any]) -> Any:
    """One with every field at its default."""
    return plugin(**REQUIRED.get(plugin.model_fields["kind"].default, {}))


def kinds(folder: str) -> list[Any]:
    return [pytest.param(plugin, id=kind) for kind, plugin in plugins(folder).items()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_holds_one_plugin_of_the_folders_contract(folder: str) -> None:
    found = plugins(folder)
    files = {path.stem for path in Path(*folder.split(".")).glob("*.py")} - {"__init__"}
    assert set(found) == files and found
    for plugin in found.values():
        assert issubclass(plugin, FOLDERS[folder]) and plugin.__doc__
        assert plugin.model_config["extra"] == "forbid" and plugin.model_config["frozen"]


@pytest.mark.parametrize("plugin", kinds("minitron_ray.distillation.losses"))
def test_a_losss_gradient_is_that_of_its_value(plugin: type[DistillationLoss]) -> None:
    """Against central differences in float64, which know nothing of the formula."""
    torch.manual_seed(0)
    loss = plugin()
    student, teacher = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    labels = torch.tensor([2, 0, 6])
    value, gradient = loss.value_and_gradient(student.clone(), teacher.clone(), labels)
    assert value.shape == (3,) and gradient.shape == (3, 7)
    step = 1e-5
    for token in range(3):
        for entry in range(7):
            moved = torch.zeros_like(student)
            moved[token, entry] = step
            above = loss.value_and_gradient(student + moved, teacher.clone(), labels)[0]
            below = loss.value_and_gradient(student - moved, teacher.clone(), labels)[0]
            change = (above - below) / (2 * step)
            assert change[token].item() == pytest.approx(gradient[token, entry].item(), abs=1e-6)
            assert change.abs().sum() == pytest.approx(change[token].abs().item())  # tokens do not mix


@pytest.mark.parametrize("plugin", kinds("minitron_ray.distillation.losses"))
def test_a_loss_has_no_preference_among_equal_shifts_of_the_logits(plugin: type[DistillationLoss]) -> None:
    loss, labels = plugin(), torch.tensor([1, 3])
    student, teacher = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    value, gradient = loss.value_and_gradient(student.clone(), teacher.clone(), labels)
    shifted, _ = loss.value_and_gradient(student + 3.0, teacher.clone(), labels)
    torch.testing.assert_close(value, shifted)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("plugin", kinds("minitron_ray.distillation.signals"))
def test_a_stored_signal_is_of_its_sequences_and_not_of_the_batches(plugin: type[Signal]) -> None:
    """Batches are appended to each other, and any sequence can be taken out again, in any company."""
    signal = plugin()
    assert signal.label
    if not isinstance(signal, StoredSignal):
        return
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 7, 8), torch.randn(300, 8)
    batches = [signal.encode(hidden[a:b], head, None, range(a, b), 1) for a, b in ((0, 2), (2, 5))]
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def dense(*numbers: int) -> torch.Tensor:
        found = signal.decode([signal.row(whole, number) for number in numbers], torch.device("cpu"))
        assert isinstance(found, SparseTargets) == signal.sparse
        if isinstance(found, torch.Tensor):
            return (found @ head.T).softmax(-1)[:, :-1]
        assert found.ids.dtype == torch.int64 and found.ids.shape[:2] == (len(numbers), 6)
        rest = 0 if found.tail is None else found.tail
        torch.testing.assert_close(found.probabilities.sum(-1) + rest, torch.ones(len(numbers), 6))
        return torch.zeros(len(numbers), 6, 300).scatter_add_(-1, found.ids, found.probabilities)

    teacher = (hidden @ head.T).softmax(-1)[:, :-1]
    assert (dense(4, 1) - teacher[[4, 1]]).abs().max() < 0.1
    torch.testing.assert_close(dense(4, 1)[1:], dense(1))
    assert signal.bytes_a_token(8, 300, 4) > 0 and digest(signal.identity)


@pytest.mark.parametrize("plugin", kinds("minitron_ray.distillation.losses"))
def test_a_loss_takes_a_few_probabilities_or_says_why_not(plugin: type[DistillationLoss]) -> None:
    """Where it does, all probabilities as a few of them give the same as the logits."""
    torch.manual_seed(0)
    loss = plugin()
    student, teacher = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    labels = torch.tensor([2, 0, 6])
    probabilities, ids = teacher.softmax(-1).sort(descending=True)
    targets = SparseTargets(ids=ids, probabilities=probabilities)
    if loss.refuses_sparse is not None:
        with pytest.raises(ValueError, match=loss.refuses_sparse):
            loss.sparse_value_and_gradient(student, targets, labels)
        return
    found = loss.sparse_value_and_gradient(student.clone(), targets, labels)
    torch.testing.assert_close(found, loss.value_and_gradient(student.clone(), teacher.clone(), labels))


@pytest.mark.parametrize("plugin", kinds("minitron_ray.distillation.intermediate"))
@pytest.mark.parametrize(
    "model_type", [name for name in supported() if family_of({"model_type": name}).norms_inputs]
)
def test_hidden_states_are_compared_behind_norms_of_the_network(
    plugin: type[StateLoss], model_type: str
) -> None:
    of = family_of({"model_type": model_type})
    names = {tensor.name for tensor in of.tensors}
    for pair in made(plugin).pairs(of, 6, 4):
        for path in (pair.teacher, pair.student):
            numbered = re.sub(r"\.\d+\.", ".{layer}.", f"{path}.weight")
            assert numbered in names and ("norm" in path or "ln_" in path)


@pytest.mark.parametrize("plugin", kinds("minitron_ray.importance.width"))
def test_a_width_metric_scores_every_unit_and_not_the_batches(
    plugin: type[UnitMetric], tiny_llama: Path
) -> None:
    metric = made(plugin)
    assert metric.label in metric.labels and digest(metric.identity)
    if isinstance(metric, StaticUnitMetric):
        checkpoint = Checkpoint(tiny_llama)
        family = family_of(checkpoint.config)
        arch = family.read(checkpoint.config)
        found = metric.score(checkpoint, family, arch).axes()
        assert {axis: values.shape for axis, values in found.items()} == unit_shapes(family, arch)
        assert all((values > 0).all() and values.dtype == np.float64 for values in found.values())
        return
    assert isinstance(metric, ListeningUnitMetric)
    activations = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 9, 4)))
    whole, split, turned, later = (metric.evidence() for _ in range(4))
    order = [2, 0, 3, 1]
    whole.add(activations)
    turned.add(activations[..., order])
    for part in activations[:4].split(2):
        split.add(part)
    later.add(activations[4:])
    later.rest()
    split.merge(pickle.loads(pickle.dumps(later)))
    assert set(whole.scores()) == set(metric.labels)
    for label, scores in whole.scores().items():
        assert scores.shape == (4,) and scores.dtype == np.float64
        np.testing.assert_allclose(scores, split.scores()[label])
        np.testing.assert_allclose(scores[order], turned.scores()[label])


@pytest.mark.parametrize("plugin", kinds("minitron_ray.importance.depth"))
def test_a_depth_metric_finds_an_identity_less_important(plugin: type[LayerMetric]) -> None:
    metric = made(plugin)
    assert metric.label
    if isinstance(metric, ListeningLayerMetric):
        x, evidence = torch.randn(4, 5, 8), metric.evidence(2)
        evidence.add(0, 1, x, x)
        evidence.add(1, 1, x, x + torch.randn_like(x))
        nothing, something = evidence.scores()[1]
    else:
        assert isinstance(metric, RemovalMetric)
        ids = torch.from_numpy(np.random.default_rng(0).integers(0, 8, (4, 9)))
        whole = torch.nn.functional.one_hot(ids.roll(-1, 1), 8) * 4.0  # knows the next token, by this head:
        values = metric.values([whole, whole, torch.randn(4, 9, 8)], Batch(ids=ids.numpy()), torch.eye(8))
        assert values.shape == (3, 4) and values.dtype == np.float64
        nothing, something = metric.reduce(values)
    assert something > nothing == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("plugin", kinds("minitron_ray.evaluation.tasks"))
def test_a_tasks_values_are_of_its_examples_and_not_of_the_batches(
    plugin: type[Task], tiny_llama: Path, tmp_path: Path
) -> None:
    rows = [
        {"context": "The loss", "choices": ["rises.", "falls."], "answer": number % 2} for number in range(5)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ids = np.random.default_rng(0).integers(0, 256, (5, 12))
    calibration = Sequences(read=ids.__getitem__, indices=tuple(range(5)))
    task = made(plugin)
    examples = pickle.loads(
        pickle.dumps(task.examples(Material(calibration=calibration, teacher=tiny_llama, base=tmp_path)))
    )
    embedding, head = torch.randn(256, 16), torch.randn(256, 16)

    def values(start: int, stop: int) -> np.ndarray:
        batch = examples.batch(start, stop)
        return task.values(embedding[torch.from_numpy(batch.ids)], batch, head)

    assert len(examples) == 5 and values(0, 5).dtype == np.float64
    np.testing.assert_array_equal(values(0, 5), np.concatenate([values(0, 2), values(2, 5)]))
    assert task.label and digest(task.inputs(tmp_path)) == digest(task.inputs(tmp_path))


@pytest.mark.parametrize("plugin", kinds("minitron_ray.search.samplers"))
def test_a_sampler_learns_with_optuna_or_has_an_order(plugin: type[SearchSampler]) -> None:
    sampler, count = made(plugin), len(made(plugin).objectives)
    if isinstance(sampler, OrderedSampler):
        names = [str(number) for number in range(12)]
        assert sorted(sampler.ordered(names, 0)) == sorted(names)
        assert sampler.ordered(names, 0) == sampler.ordered(names, 0)
        return
    assert isinstance(sampler, LearningSampler) and sampler.startup_trials > 0

    def proposed(seed: int) -> list[int]:
        study = optuna.create_study(sampler=sampler.build(seed), directions=["minimize"] * count)
        values = []
        for _ in range(12):
            trial = study.ask()
            values.append(trial.suggest_int("x", 0, 1000))
            study.tell(trial, [float(abs(values[-1] - 400))] * count)
        return values

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    assert proposed(0) == proposed(0) != proposed(1)


@pytest.mark.parametrize("plugin", kinds("minitron_ray.data.sources"))
def test_a_source_is_text_or_tokens_or_a_mixture(plugin: type[Source]) -> None:
    assert sum(issubclass(plugin, base) for base in (TextSource, TokenSource, MixedSource)) == 1
    assert ("path" in plugin.model_fields) != issubclass(plugin, MixedSource)
