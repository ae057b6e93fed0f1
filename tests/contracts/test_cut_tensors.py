"""A student is built from weights that are cut while it is built: the same, and never all in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minitron_ray.weights.model import build
from minitron_ray.weights.surgery import CutTensors, cut
from tests.contracts.networks import CONFIGS, Case, random_kept
from tests.watched import Watched


@pytest.fixture(params=CONFIGS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case.of(request.param)


def spread(layer: nn.Module) -> None:
    """What sharding does as far as memory goes: the layer's weights are somewhere else, their sizes stay."""
    for parameter in layer.parameters():
        parameter.data = parameter.new_zeros(1).expand(parameter.shape)


@pytest.mark.parametrize("seed", range(2))
def test_a_build_that_spreads_layers_holds_one_of_them(case: Case, seed: int) -> None:
    kept = random_kept(case.family, case.arch, seed)
    config, student = case.student_config(kept), kept.architecture(case.arch)
    weights = Watched(
        CutTensors(case.weights, case.family, case.arch, kept, dtype="float32"),
        list(case.family.rows(student)),
    )
    model = build(config, weights, trainable=True, each_layer=spread)
    assert weights.most == 1
    assert {name for name in weights.alive if case.family.decoder_layers in name} == set()
    del model
    assert not weights.alive


def test_what_is_held_is_counted(case: Case) -> None:
    """So that the test above can fail."""
    kept = random_kept(case.family, case.arch, 0)
    rows = list(case.family.rows(kept.architecture(case.arch)))
    weights = Watched(cut(case.weights, case.family, case.arch, kept), rows)
    held = dict(weights)
    assert weights.alive == set(held) and weights.most == len(kept.layers)
    del held
    assert not weights.alive


@pytest.mark.parametrize("seed", range(2))
def test_it_builds_the_student_that_the_finished_weights_do(case: Case, seed: int) -> None:
    """In any order, as often as one likes; of memory of its own."""
    kept = random_kept(case.family, case.arch, seed)
    config = case.student_config(kept)
    finished = cut(case.weights, case.family, case.arch, kept)
    on_demand = CutTensors(case.weights, case.family, case.arch, kept)
    assert list(on_demand) == list(finished) and len(on_demand) == len(finished)
    for name in reversed(list(finished)):
        on_demand[name].fill_(7)
        assert torch.equal(on_demand[name], finished[name]), name
    one, other = build(config, finished).state_dict(), build(config, on_demand).state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
