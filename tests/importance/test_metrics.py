"""Activation scores and Block Importance against numpy, and what must not change them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from minitron_ray.core.errors import ConfigError, MinitronError
from minitron_ray.importance.capture import gather, grouped, merged
from minitron_ray.importance.depth.block_importance import BlockImportance
from minitron_ray.importance.evidence import Evidence, Listeners
from minitron_ray.importance.scores import Scores
from minitron_ray.importance.units import UnitScores
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
    metric = Activation(batch=batch, sequence=sequence)
    evidence = metric.evidence()
    evidence.add(ACTIVATIONS)
    expected = AGGREGATE[batch](AGGREGATE[sequence](ACTIVATIONS.numpy(), 1), 0)
    np.testing.assert_allclose(evidence.scores()[metric.label], expected, rtol=1e-5)


def test_all_nine_come_out_of_one_pass() -> None:
    everything = Activation(gather="all").evidence()
    everything.add(ACTIVATIONS)
    for batch, sequence in itertools.product(AGGREGATE, AGGREGATE):
        metric = Activation(batch=batch, sequence=sequence)  # type: ignore[arg-type]
        alone = metric.evidence()
        alone.add(ACTIVATIONS)
        np.testing.assert_array_equal(everything.scores()[metric.label], alone.scores()[metric.label])
    assert set(everything.scores()) == set(Activation(gather="all").labels) and len(everything.scores()) == 9


def test_only_what_decides_the_table_is_identity() -> None:
    one = Activation(gather="all", batch="mean", sequence="var")
    assert one.identity == Activation(gather="all").identity
    assert one.label != Activation(gather="all").label
    assert Activation(batch="mean").identity != Activation().identity
    assert Activation(gather="all", heads="channels").identity != one.identity
    assert not set(Activation(gather="all", heads="channels").labels) & set(one.labels)


def test_the_order_of_the_two_matters() -> None:
    evidence = Activation().evidence()
    evidence.add(ACTIVATIONS)
    batch_first = np.sqrt((np.abs(ACTIVATIONS.numpy()).mean(0) ** 2).sum(0))
    assert not np.allclose(evidence.scores()[Activation().label], batch_first, rtol=0.05)


@pytest.mark.parametrize("batch", AGGREGATE)
def test_the_split_into_batches_does_not_show(batch: Aggregation) -> None:
    whole, parts = Activation(batch=batch).evidence(), Activation(batch=batch).evidence()
    whole.add(ACTIVATIONS)
    for part in ACTIVATIONS.split([1, 4, 2]):
        parts.add(part)
    label = Activation(batch=batch).label
    np.testing.assert_allclose(whole.scores()[label], parts.scores()[label], rtol=1e-12)


@pytest.mark.parametrize(("batch", "sequence"), list(itertools.product(AGGREGATE, AGGREGATE)))
def test_routed_tokens_are_aggregated_like_sequences_of_their_own(
    batch: Aggregation, sequence: Aggregation
) -> None:
    metric = Activation(batch=batch, sequence=sequence)
    routed, expected = metric.evidence(), metric.evidence()
    tokens = ACTIVATIONS[0]  # 11 tokens: the first four of sample 2, the others of sample 0, none of 1
    routed.add_routed(tokens, torch.tensor([2] * 4 + [0] * 7), samples=3)
    for sample in (tokens[4:], tokens[:4]):
        expected.add(sample[None])
    np.testing.assert_allclose(
        routed.scores()[metric.label], expected.scores()[metric.label], rtol=1e-5, atol=1e-7
    )


def cosine(layers: int, *streams: torch.Tensor, blocks: tuple[int, ...] = ()) -> Mapping[int, NDArray]:
    evidence = BlockImportance(blocks=blocks).evidence(layers)
    for length in evidence.lengths:
        for start in range(layers - length + 1):
            evidence.add(start, length, streams[start], streams[start + length])
    return evidence.scores()


def test_an_identity_layer_has_no_block_importance_and_scale_does_not_count() -> None:
    x = torch.randn(2, 3, 8)
    scores = cosine(3, x, x, 5 * x, -x, blocks=(2,))
    np.testing.assert_allclose(scores[1], [0, 0, 2], atol=1e-6)
    np.testing.assert_allclose(scores[2], [0, 2], atol=1e-6)


def test_a_block_as_long_as_the_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match="a block of 4 layers cannot go from a teacher of 4"):
        BlockImportance(blocks=(4,)).evidence(4)


WEIGHTS = Mapping[str, torch.Tensor]
PAPER, BI = Activation(), BlockImportance()


def listen(
    folder: Path,
    width: Activation | None = PAPER,
    depth: BlockImportance | None = BI,
    *,
    size: int = 3,
    tensors: WEIGHTS | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Listeners, Evidence]:
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config)
    model = build(checkpoint.config, tensors or checkpoint, dtype=dtype, device="cpu", trainable=False)
    ears = Listeners(family=family, architecture=family.read(checkpoint.config), width=width, depth=depth)
    groups = grouped(range(len(IDS)), size)
    found = merged(gather(Headless(model), ears, groups, lambda indices: IDS[indices], lambda done: None))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return ears, found


def units(folder: Path, width: Activation = PAPER, *, size: int = 3, **more: WEIGHTS) -> UnitScores:
    ears, found = listen(folder, width, None, size=size, **more)  # type: ignore[arg-type]
    return ears.unit_scores(found)[width.label]


def recorded(folder: Path) -> tuple[list[torch.Tensor], torch.nn.Module]:
    """Transformers' own record of the stream before each layer; the last one is already normed."""
    checkpoint = Checkpoint(folder)
    model = build(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", trainable=False)
    with torch.no_grad():
        return list(model.model(torch.from_numpy(IDS), output_hidden_states=True).hidden_states), model.model


def test_block_importance_of_a_model_equals_that_of_its_recorded_stream(tiny_llama: Path) -> None:
    states, _ = recorded(tiny_llama)
    _, evidence = listen(tiny_llama, None, BlockImportance(blocks=(2, 3)))
    assert evidence.stream is not None
    scores = evidence.stream.scores()
    assert {length: len(values) for length, values in scores.items()} == {1: 4, 2: 3, 3: 2}
    for length, values in scores.items():
        for start in range(4 - length):
            expected = (
                1
                - torch.nn.functional.cosine_similarity(states[start], states[start + length], dim=-1).mean()
            )
            assert values[start] == pytest.approx(expected.item(), rel=1e-4)


def test_hidden_is_the_sum_over_norms_and_the_final_one_only_where_asked(tiny_llama: Path) -> None:
    states, decoder = recorded(tiny_llama)

    def worth(normed: torch.Tensor) -> NDArray:
        return np.sqrt((normed.abs().mean(1) ** 2).sum(0).numpy())

    without, including = units(tiny_llama), units(tiny_llama, Activation(final_norm=True))
    np.testing.assert_allclose(including.hidden - without.hidden, worth(states[-1]), rtol=1e-4)
    seen: list[torch.Tensor] = []
    for layer in decoder.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        decoder(torch.from_numpy(IDS))
    np.testing.assert_allclose(without.hidden, sum(worth(output) for output in seen), rtol=1e-4)


@pytest.mark.parametrize("rule", ["norm", "channels"])
def test_heads_by_norm_and_by_channel_and_groups_from_them(tiny_llama: Path, rule: str) -> None:
    scores = units(tiny_llama, Activation(heads=rule))  # type: ignore[arg-type]
    _, decoder = recorded(tiny_llama)
    seen: list[NDArray] = []
    for layer in decoder.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].numpy()))
    with torch.no_grad():
        decoder(torch.from_numpy(IDS))
    for layer, output in enumerate(seen):
        each = output.reshape(6, 20, 6, 8).astype(np.float64)  # samples, tokens, heads, head_dim
        if rule == "norm":
            expected = np.sqrt((np.linalg.norm(each, axis=-1).mean(1) ** 2).sum(0))
        else:
            expected = np.linalg.norm(np.sqrt((np.abs(each).mean(1) ** 2).sum(0)), axis=-1)
        np.testing.assert_allclose(scores.heads[layer], expected, rtol=1e-4)
        np.testing.assert_allclose(
            scores.kv_heads[layer], np.hypot(expected[0::2], expected[1::2]), rtol=1e-4
        )


def test_a_silent_neuron_and_head_score_nothing(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}
    tensors["model.layers.2.mlp.up_proj.weight"][7] = 0
    tensors["model.layers.1.self_attn.v_proj.weight"][:8] = 0  # the first KV group: heads 0 and 1
    scores = units(tiny_llama, tensors=tensors)
    assert scores.mlp is not None
    assert scores.mlp[2, 7] == 0 and (np.delete(scores.mlp[2], 7) > 0).all()
    assert (scores.heads[1, :2] == 0).all() and (scores.heads[1, 2:] > 0).all()
    assert scores.kv_heads[1, 0] == 0 and (scores.kv_heads[1, 1:] > 0).all()


def test_batches_do_not_change_the_scores_of_a_model(tiny_llama: Path) -> None:
    one, many = units(tiny_llama, size=6).axes(), units(tiny_llama, size=2).axes()
    assert set(one) == {"hidden", "heads", "kv_heads", "mlp"}
    for axis, values in one.items():
        np.testing.assert_allclose(values, many[axis], rtol=1e-5)


def test_weights_that_are_not_finite_are_named(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}
    tensors["model.layers.2.mlp.up_proj.weight"][7, 3] = float("nan")
    with pytest.raises(
        MinitronError, match=r"layer 2 \(mlp\) are not finite: its weights mlp.up_proj.weight hold NaN"
    ):
        listen(tiny_llama, tensors=tensors)


def test_an_overflow_is_told_from_a_broken_weight(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 3000
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3000
    with pytest.raises(MinitronError, match=r"layer 1 \(mlp\).*float16 overflows.*`precision: float32`"):
        listen(tiny_llama, tensors=tensors, dtype=torch.float16)


def test_scores_survive_the_table(tiny_llama: Path, tmp_path: Path) -> None:
    from minitron_ray.results.store import Store

    ears, evidence = listen(tiny_llama, Activation(gather="all"), BlockImportance(blocks=(2,)))
    assert evidence.stream is not None
    store = Store(tmp_path, "x", "y")
    layers = evidence.stream.scores()
    for number, (label, scores) in enumerate(ears.unit_scores(evidence).items()):
        joined = scores.with_layers(layers if number == 0 else {})
        store.append("importance", joined.rows(label, "depth"), writer="importance", sequence=number)
    table = store.read("importance")
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    for label, scores in ears.unit_scores(evidence).items():
        back = Scores.from_table(shuffled, label, "depth")
        for axis, values in scores.axes().items():
            np.testing.assert_array_equal(values, getattr(back, axis))
        np.testing.assert_array_equal(back.layers, layers[1])
        np.testing.assert_array_equal(back.blocks[2], layers[2])
