"""A model run layer by layer gives the bits of its own forward pass, in memory and from its files."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.layerwise import Layerwise, StreamedLayerwise
from minitron_ray.weights.model import build
from tests.contracts.networks import CONFIGS

IDS = torch.arange(36).reshape(3, 12) * 5 % 61 + 2  # no padding token of any config is among them


@dataclass(frozen=True)
class Case:
    family: Family
    config: dict[str, Any]
    folder: Path

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        return build(self.config, self.checkpoint, dtype=dtype)

    def final(self, model: Any) -> torch.Tensor:
        return model.get_submodule(self.family.backbone)(input_ids=IDS).last_hidden_state


@pytest.fixture(params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    config = CONFIGS[request.param]
    family = family_of(config)
    source = torch.Generator().manual_seed(0)
    shapes = family.shapes(family.read(config))
    weights = {name: torch.randn(shape, generator=source) * 0.3 for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Case(family, config, tmp_path)


def run(network: Layerwise) -> torch.Tensor:
    state = network.start(IDS)
    hidden = state.hidden
    for layer in range(network.layers):
        hidden = network.apply(layer, hidden, state)
    return network.finish(hidden)


def test_in_memory(case: Case) -> None:
    model = case.model()
    network = Layerwise(model, case.family)
    before = case.final(model)
    assert torch.equal(run(network), before)
    assert torch.equal(run(network), before)  # nothing is left over from the first batch
    assert torch.equal(case.final(model), before)  # and the model is as it was
    assert network.head is model.get_output_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_files(case: Case, dtype: torch.dtype) -> None:
    model = case.model(dtype)
    network = StreamedLayerwise(case.checkpoint, dtype=dtype, device="cpu")
    assert torch.equal(run(network), case.final(model))
    assert torch.equal(network.head, model.get_output_embeddings().weight)
    assert network.token_bytes == model.config.hidden_size * dtype.itemsize


def test_one_layer_is_held_at_a_time_and_any_order_will_do(case: Case) -> None:
    model = case.model()
    network, reference = (
        StreamedLayerwise(case.checkpoint, dtype=torch.float32, device="cpu"),
        Layerwise(model, case.family),
    )
    state = network.start(IDS)
    for layer in (2, 0, 3):
        streamed = network.apply(layer, state.hidden, state)
        assert torch.equal(streamed, reference.apply(layer, state.hidden, state))
        held = {number for number in range(4) if not next(network.module(number).parameters()).is_meta}
        assert held == {layer}


def test_leaving_a_layer_out_is_the_model_without_it(case: Case) -> None:
    model = case.model()
    network = Layerwise(model, case.family)
    state = network.start(IDS)
    hidden = state.hidden
    for layer in (0, 1, 3):
        hidden = network.apply(layer, hidden, state)
    shorter = copy.deepcopy(model)
    config = shorter.config
    del shorter.get_submodule(case.family.decoder_layers)[2]
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for layer, kind in enumerate(config.layer_types) if layer != 2]
    assert torch.equal(network.finish(hidden), case.final(shorter))


@pytest.mark.parametrize("streamed", [False, True])
def test_hooks_hear_the_real_modules(case: Case, streamed: bool) -> None:
    network = (
        StreamedLayerwise(case.checkpoint, dtype=torch.float32, device="cpu")
        if streamed
        else Layerwise(case.model(), case.family)
    )
    heard: list[str] = []
    norm = network.model.get_submodule(case.family.final_norm)
    norm.register_forward_hook(lambda *_: heard.append("norm"))
    network.module(1).register_forward_hook(lambda *_: heard.append("layer 1"))
    run(network)
    assert heard == ["layer 1", "norm"]


def test_a_damaged_checkpoint_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    save_file({"model.norm.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"the weights lack model\.embed_tokens\.weight"):
        StreamedLayerwise(Checkpoint(tmp_path), dtype=torch.float32, device="cpu")
