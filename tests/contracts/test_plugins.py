"""What every file of a plug-in folder must do, whatever its kind: one suite a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from minitron_ray.core.kinds import plugins
from minitron_ray.data.source import Source, TextSource, TokenSource
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.importance.metric import LayerMetric, UnitMetric
from minitron_ray.search.sampler import SearchSampler

FOLDERS: dict[str, type[Any]] = {
    "minitron_ray.data.sources": Source,
    "minitron_ray.distillation.losses": DistillationLoss,
    "minitron_ray.importance.width": UnitMetric,
    "minitron_ray.importance.depth": LayerMetric,
    "minitron_ray.search.samplers": SearchSampler,
}


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


@pytest.mark.parametrize("plugin", kinds("minitron_ray.importance.width"))
def test_a_width_metric_follows_its_units_and_not_the_batches(plugin: type[UnitMetric]) -> None:
    activations = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 9, 4)))
    whole, split, turned = (plugin().evidence() for _ in range(3))
    order = [2, 0, 3, 1]
    whole.add(activations)
    turned.add(activations[..., order])
    for part in activations.split(2):
        split.add(part)
    assert whole.scores().shape == (4,) and whole.scores().dtype == np.float64
    np.testing.assert_allclose(whole.scores(), split.scores())
    np.testing.assert_allclose(whole.scores()[order], turned.scores())
    assert plugin().label


@pytest.mark.parametrize("plugin", kinds("minitron_ray.importance.depth"))
def test_a_depth_metric_finds_an_identity_less_important(plugin: type[LayerMetric]) -> None:
    x = torch.randn(4, 5, 8)
    nothing, something = plugin().evidence(), plugin().evidence()
    nothing.add(x, x)
    something.add(x, x + torch.randn_like(x))
    assert something.score() > nothing.score()
    assert plugin().label


@pytest.mark.parametrize("plugin", kinds("minitron_ray.search.samplers"))
def test_a_samplers_seed_decides_what_it_proposes(plugin: type[SearchSampler]) -> None:
    def proposed(seed: int) -> list[int]:
        study = optuna.create_study(sampler=plugin().build(seed))
        values = []
        for _ in range(12):
            trial = study.ask()
            values.append(trial.suggest_int("x", 0, 1000))
            study.tell(trial, float(abs(values[-1] - 400)))
        return values

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    assert proposed(0) == proposed(0) != proposed(1)


@pytest.mark.parametrize("plugin", kinds("minitron_ray.data.sources"))
def test_a_source_is_text_or_tokens(plugin: type[Source]) -> None:
    assert issubclass(plugin, TextSource) != issubclass(plugin, TokenSource)
    assert "path" in plugin.model_fields
