"""Documents that share a sequence and are kept apart: each is what it is when it runs by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from minitron_ray.core.errors import MinitronError
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.documents import positions, predicted, predictions
from minitron_ray.weights.headless import Headless, final_hidden
from minitron_ray.weights.layerwise import Layerwise, StreamedLayerwise
from minitron_ray.weights.model import build
from tests.contracts.networks import CONFIGS, Case

END = 63
LENGTHS = ((9, 1, 6), (2, 3, 11), (16,))
"""Of the documents of three sequences: one that is only its end, one that has no end, one alone."""


def packed(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> Tensor:
    """Ids of sequences whose documents have these lengths; the first two sequences end with a document."""
    ids = torch.randint(3, END, (len(lengths), 16), generator=torch.Generator().manual_seed(1))
    for row, sizes in zip(ids[:2], lengths, strict=False):
        row[torch.tensor(sizes).cumsum(0) - 1] = END
    ids[1, -1] = 5
    return ids


def alone(model: Headless, ids: Tensor) -> Tensor:
    """The hidden states of every document, run by itself as an ordinary text, put back in their places."""
    plain = Headless(model.model)
    rows = [
        torch.cat([plain(document[None], final_hidden)[0] for document in row.split(sizes)])
        for row, sizes in zip(ids, map(list, LENGTHS), strict=True)
    ]
    return torch.stack(rows)


@pytest.fixture(params=CONFIGS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case.of(request.param)


def test_positions_begin_again_behind_every_end() -> None:
    ids = torch.tensor([[4, END, 4, 4, END, END, 4], [END, 4, 4, 4, 4, 4, END]])
    assert positions(ids, END) is not None
    assert torch.equal(positions(ids, END), torch.tensor([[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]))
    assert positions(ids, None) is None


def test_the_first_token_of_a_document_is_not_predicted() -> None:
    ids = torch.tensor([[4, END, 4, 4, END], [4, 4, 4, 4, 4]])
    found = predicted(ids, END)
    assert found is not None
    assert found.tolist() == [[True, False, True, True], [True, True, True, True]]
    assert (predictions(ids, END), predictions(ids, None)) == (7, 8)
    assert predicted(ids, None) is None


def test_a_sequence_that_predicts_nothing_is_refused() -> None:
    with pytest.raises(MinitronError, match=r"nothing but end-of-text tokens \(id 63\).*documents: joined"):
        predicted(torch.tensor([[4, 4, 4], [END, END, 4]]), END)


def test_a_document_is_what_it_is_alone(case: Case) -> None:
    model, ids = Headless(build(case.config, case.weights), END), packed()
    with torch.no_grad():
        expected = alone(model, ids)
        apart = model(ids, final_hidden)
        joined = Headless(model.model)(ids, final_hidden)
    assert_close(apart, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(joined, expected, atol=1e-2)  # the test can tell


def test_a_sequence_of_one_document_is_as_if_it_were_joined(case: Case) -> None:
    model, ids = build(case.config, case.weights), packed()[2:]
    with torch.no_grad():
        assert torch.equal(Headless(model, END)(ids, final_hidden), Headless(model)(ids, final_hidden))


@pytest.mark.parametrize("streamed", [False, True])
def test_layer_by_layer(case: Case, tmp_path: Path, streamed: bool) -> None:
    model, ids = build(case.config, case.weights), packed()
    network = Layerwise(model, case.family)
    if streamed:
        save_file(case.weights, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(case.config))
        network = StreamedLayerwise(Checkpoint(tmp_path), dtype=torch.float32, device="cpu")
    state = network.start(ids, END)
    hidden = state.hidden
    for layer in range(network.layers):
        hidden = network.apply(layer, hidden, state)
    with torch.no_grad():
        assert torch.equal(network.finish(hidden), Headless(model, END)(ids, final_hidden))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients(name: str) -> None:
    """One family that computes attention in one kernel, and one that does not."""
    case, ids = Case.of(name), packed()
    model = Headless(build(case.config, case.weights, trainable=True), END)
    outer = torch.randn(*ids.shape, case.arch.hidden, generator=torch.Generator().manual_seed(2))
    (model(ids, final_hidden) * outer).sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    (alone(model, ids) * outer).sum().backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-3, msg=name)
