"""However a teacher is run and the work shared out, the scores are the same bits."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minitron_ray.core.errors import MinitronError
from minitron_ray.importance.activations import Activations
from minitron_ray.importance.capture import GROUPS, gather, gather_streamed, grouped, merged
from minitron_ray.importance.depth.block_importance import BlockImportance
from minitron_ray.importance.evidence import Evidence, Listeners
from minitron_ray.importance.width.activation import Activation
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.layerwise import StreamedLayerwise
from minitron_ray.weights.model import build
from minitron_ray.weights.writing import write_checkpoint
from tests.contracts.networks import Case

IDS = np.random.default_rng(0).integers(0, 64, (9, 16))


def ears(case: Case) -> Listeners:
    return Listeners(
        family=case.family,
        architecture=case.arch,
        width=Activation(gather="all", final_norm=True),
        depth=BlockImportance(blocks=(2, 3)),
    )


def table(listeners: Listeners, evidence: Evidence) -> dict[str, np.ndarray]:
    """Every score, by label and axis."""
    assert evidence.stream is not None
    found = {f"layers {length}": values for length, values in evidence.stream.scores().items()}
    for label, scores in listeners.unit_scores(evidence).items():
        found |= {f"{label} {axis}": values for axis, values in scores.axes().items()}
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() and one
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def resident(
    case: Case, dtype: torch.dtype = torch.float32, separator: int | None = None
) -> dict[str, np.ndarray]:
    model = Headless(build(case.config, case.weights, dtype=dtype), separator)
    listeners, groups = ears(case), grouped(range(len(IDS)), 2)
    found = gather(model, listeners, groups, IDS.__getitem__, lambda done: None)
    return table(listeners, merged(found))


def saved(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> StreamedLayerwise:
    write_checkpoint(folder, case.weights.items(), case.config, dtype=dtype)
    return StreamedLayerwise(Checkpoint(folder), dtype=dtype, device="cpu")


@pytest.mark.parametrize("name", ["llama", "nemotron", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "file"])
def test_a_streamed_teacher_scores_as_a_resident_one(name: str, on_disk: bool, tmp_path: Path) -> None:
    case = Case.of(name)
    listeners, groups, told = ears(case), grouped(range(len(IDS)), 2), []
    scratch = tmp_path / "scratch" if on_disk else None
    found = gather_streamed(
        saved(case, tmp_path / "model"), listeners, groups, IDS.__getitem__, told.append, scratch
    )
    same(table(listeners, merged(found)), resident(case))
    assert told == sorted(told) and told[-1] == len(IDS)
    assert scratch is None or not list(scratch.iterdir())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_documents_are_apart_in_a_streamed_teacher_as_in_a_resident_one(name: str, tmp_path: Path) -> None:
    case, separator = Case.of(name), int(IDS[0, 5])
    listeners, groups = ears(case), grouped(range(len(IDS)), 2)
    found = gather_streamed(
        saved(case, tmp_path), listeners, groups, IDS.__getitem__, lambda done: None, None, separator
    )
    whole, apart = resident(case), resident(case, separator=separator)
    same(table(listeners, merged(found)), apart)
    assert all(not np.array_equal(whole[axis], values) for axis, values in apart.items() if "mean" in axis)


def test_bfloat16_streams_keep_their_bits(tmp_path: Path) -> None:
    case = Case.of("llama")
    teacher = saved(case, tmp_path / "model", torch.bfloat16)
    listeners, groups = ears(case), grouped(range(len(IDS)), 2)
    found = gather_streamed(teacher, listeners, groups, IDS.__getitem__, lambda done: None, tmp_path)
    same(table(listeners, merged(found)), resident(case, torch.bfloat16))


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_the_number_of_workers_does_not_show(workers: int) -> None:
    case = Case.of("qwen3_moe")
    listeners, groups = ears(case), grouped(range(len(IDS)), 2)
    parts = []
    for share in np.array_split(np.arange(len(groups)), workers):
        model = Headless(build(case.config, case.weights))  # as each worker opens its own
        mine = [groups[number] for number in share]
        found = gather(model, listeners, mine, IDS.__getitem__, lambda done: None)
        parts += pickle.loads(pickle.dumps(found))
    same(table(listeners, merged(parts)), resident(case))


def test_groups_are_whole_micro_batches_in_order() -> None:
    groups = grouped(range(101), 4)
    batches = [batch for group in groups for batch in group]
    assert len(groups) == GROUPS and [len(batch) for batch in batches] == [4] * 25 + [1]
    assert np.concatenate(batches).tolist() == list(range(101))
    assert len(grouped(range(3), 4)) == 1


def test_a_streamed_teacher_stops_at_the_first_broken_layer(tmp_path: Path) -> None:
    case = Case.of("llama")
    name = "model.layers.1.self_attn.o_proj.weight"
    case.weights[name] = case.weights[name].clone().fill_(float("inf"))
    with pytest.raises(
        MinitronError, match=r"layer 1 \(hidden\) are not finite: its weights self_attn.o_proj.weight"
    ):
        gather_streamed(
            saved(case, tmp_path),
            ears(case),
            grouped(range(4), 2),
            IDS.__getitem__,
            lambda done: None,
            None,
        )


def test_streams_are_kept_for_as_many_positions_as_asked(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    given = [torch.randn(2, 3, 4).bfloat16() for _ in range(5)]
    for folder in (None, tmp_path):
        with Activations(1, 3, folder) as streams:
            for position, stream in enumerate(given):
                streams.put(position, 0, stream)
            for position in (2, 3, 4):
                assert_close(streams.get(position, 0, cpu), given[position], rtol=0, atol=0)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_experts_against_the_formula_written_out(norm_topk_prob: bool) -> None:
    """The oracle routes by hand, token by token, from the MLP's input."""
    case = Case.of("qwen3_moe", norm_topk_prob=norm_topk_prob)
    model = build(case.config, case.weights)
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(torch.from_numpy(IDS))
    listeners = Listeners(family=case.family, architecture=case.arch, width=Activation(), depth=None)
    found = gather(Headless(model), listeners, [(np.arange(9),)], IDS.__getitem__, lambda done: None)
    scores = listeners.unit_scores(merged(found))[Activation().label]
    assert scores.mlp is None and scores.experts is not None and scores.expert_mlp is not None
    for layer, hidden in enumerate(inputs[: case.arch.layers]):
        w = {n: case.weights[f"model.layers.{layer}.mlp.{n}.weight"] for n in ("gate",)}
        probabilities = torch.softmax(hidden @ w["gate"].T, -1)
        for expert in range(case.arch.experts):
            gate, up, down = (
                case.weights[f"model.layers.{layer}.mlp.experts.{expert}.{n}_proj.weight"]
                for n in ("gate", "up", "down")
            )
            norms, magnitudes = [], []
            for sample in range(9):
                neurons = []
                for token in range(16):
                    top = torch.topk(probabilities[sample, token], 2)
                    if expert not in top.indices:
                        continue
                    weight = probabilities[sample, token, expert]
                    weight = weight / top.values.sum() if norm_topk_prob else weight
                    x = hidden[sample, token]
                    inner = torch.nn.functional.silu(gate @ x) * (up @ x)
                    norms.append((weight * (down @ inner)).norm().item())
                    neurons.append(inner.abs())
                if neurons:
                    magnitudes.append(torch.stack(neurons).mean(0))
            expected = np.mean(norms) if norms else 0.0
            assert scores.experts[layer, expert] == pytest.approx(expected, rel=1e-4)
            if magnitudes:
                worth = torch.stack(magnitudes).square().sum(0).sqrt().numpy()
                np.testing.assert_allclose(scores.expert_mlp[layer, expert], worth, rtol=1e-4)
