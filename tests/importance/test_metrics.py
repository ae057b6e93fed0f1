"""Activation scores and Block Importance against numpy, and what must not change them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_ray.core.errors import MinitronError
from minitron_ray.importance.capture import measure_importance
from minitron_ray.importance.depth.block_importance import BlockImportance
from minitron_ray.importance.scores import Scores
from minitron_ray.importance.width.activation import Activation, Aggregation
from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build

AGGREGATE = {
    "mean": lambda x, axis: np.abs(x).mean(axis),
    "l2": lambda x, axis: np.sqrt((x**2).sum(axis)),
    "var": lambda x, axis: x.var(axis),
}
ACTIVATIONS = torch.from_numpy(np.random.default_rng(0).normal(0.3, 1.0, (7, 11, 5)))
IDS = np.random.default_rng(1).integers(0, 256, (6, 20))


@pytest.mark.parametrize(("batch", "sequence"), list(itertools.product(AGGREGATE, AGGREGATE)))
def test_sequence_first_then_batch(batch: Aggregation, sequence: Aggregation) -> None:
    evidence = Activation(batch=batch, sequence=sequence).evidence()
    evidence.add(ACTIVATIONS)
    expected = AGGREGATE[batch](AGGREGATE[sequence](ACTIVATIONS.numpy(), 1), 0)
    np.testing.assert_allclose(evidence.scores(), expected, rtol=1e-5)


def test_the_order_of_the_two_matters() -> None:
    evidence = Activation().evidence()
    evidence.add(ACTIVATIONS)
    batch_first = np.sqrt((np.abs(ACTIVATIONS.numpy()).mean(0) ** 2).sum(0))
    assert not np.allclose(evidence.scores(), batch_first, rtol=0.05)


@pytest.mark.parametrize("batch", AGGREGATE)
def test_the_split_into_batches_does_not_show(batch: Aggregation) -> None:
    whole, parts = Activation(batch=batch).evidence(), Activation(batch=batch).evidence()
    whole.add(ACTIVATIONS)
    for part in ACTIVATIONS.split([1, 4, 2]):
        parts.add(part)
    np.testing.assert_allclose(whole.scores(), parts.scores(), rtol=1e-12)


def test_an_identity_layer_has_no_block_importance_and_scale_does_not_count() -> None:
    x = torch.randn(2, 3, 8)
    identity, scaled, turned = (BlockImportance().evidence() for _ in range(3))
    identity.add(x, x)
    scaled.add(x, 5 * x)
    turned.add(x, -x)
    assert identity.score() == pytest.approx(0.0, abs=1e-6)
    assert scaled.score() == pytest.approx(0.0, abs=1e-6)
    assert turned.score() == pytest.approx(2.0, abs=1e-6)


def score(folder: Path, ids: np.ndarray, batches: int) -> Scores:
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config)
    model = build(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", trainable=False)
    teacher = Headless(model)
    scores = measure_importance(
        teacher,
        family,
        family.read(checkpoint.config),
        iter(np.array_split(ids, batches)),
        Activation(),
        BlockImportance(),
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return scores


def test_scores_of_a_model_equal_those_of_its_recorded_activations(tiny_llama: Path) -> None:
    """The oracle is transformers' own record of hidden states, and the layers' modules called by hand."""
    scores = score(tiny_llama, IDS, batches=2)
    checkpoint = Checkpoint(tiny_llama)
    model = build(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", trainable=False)
    with torch.no_grad():
        states = model.model(torch.from_numpy(IDS), output_hidden_states=True).hidden_states
    # The last recorded state is already normed; layers 0 to 2 are what both sides know.
    for layer in range(3):
        x, y = states[layer], states[layer + 1]
        expected = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
        assert scores.layers[layer] == pytest.approx(expected.item(), rel=1e-4)
    first_norm = model.model.layers[0].input_layernorm(states[0])
    first_only = np.sqrt((first_norm.abs().mean(1) ** 2).sum(0).numpy())
    assert (scores.hidden > first_only).all()  # one of eight summands
    assert scores.hidden.shape == (48,) and scores.heads.shape == (4, 6)
    assert scores.mlp.shape == (4, 96) and scores.layers.shape == (4,)


def test_a_silent_neuron_and_head_score_nothing(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    family = family_of(checkpoint.config)
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}
    tensors["model.layers.2.mlp.up_proj.weight"][7] = 0
    tensors["model.layers.1.self_attn.v_proj.weight"][:8] = 0  # the first KV group: heads 0 and 1
    model = build(checkpoint.config, tensors, dtype=torch.float32, device="cpu", trainable=False)
    scores = measure_importance(
        Headless(model), family, family.read(checkpoint.config), iter([IDS]), Activation(), BlockImportance()
    )
    assert scores.mlp[2, 7] == 0 and (np.delete(scores.mlp[2], 7) > 0).all()
    assert (scores.heads[1, :2] == 0).all() and (scores.heads[1, 2:] > 0).all()


def test_batches_do_not_change_the_scores_of_a_model(tiny_llama: Path) -> None:
    one, many = score(tiny_llama, IDS, batches=1), score(tiny_llama, IDS, batches=4)
    for name in ("hidden", "heads", "mlp", "layers"):
        np.testing.assert_allclose(getattr(one, name), getattr(many, name), rtol=1e-5)


def test_weights_that_are_not_finite_are_named(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    family = family_of(checkpoint.config)
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}
    tensors["model.layers.2.mlp.up_proj.weight"][7, 3] = float("nan")
    model = build(checkpoint.config, tensors, dtype=torch.float32, device="cpu", trainable=False)
    with pytest.raises(MinitronError, match="activations of layer 2 are not finite"):
        measure_importance(
            Headless(model),
            family,
            family.read(checkpoint.config),
            iter([IDS]),
            Activation(),
            BlockImportance(),
        )


def test_scores_survive_the_table(tiny_llama: Path, tmp_path: Path) -> None:
    from minitron_ray.results.store import Store

    scores = score(tiny_llama, IDS, batches=1)
    store = Store(tmp_path, "x", "y")
    store.append("importance", scores.rows("w", "d"), writer="importance", sequence=0)
    table = store.read("importance")
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    back = Scores.from_table(shuffled)
    for name in ("hidden", "heads", "mlp", "layers"):
        np.testing.assert_array_equal(getattr(scores, name), getattr(back, name))
    assert set(table["axis"].to_pylist()) == {"hidden", "heads", "mlp", "layers"}
    assert {r["layer"] for r in table.to_pylist() if r["axis"] == "hidden"} == {-1}
