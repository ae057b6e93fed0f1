"""Weight magnitude against what a cut removes, and random scores that a seed decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minitron_ray.core.errors import MinitronError
from minitron_ray.importance.units import UnitScores
from minitron_ray.importance.width.random import Random
from minitron_ray.importance.width.weight_magnitude import PIECE, WeightMagnitude
from minitron_ray.models.kept import Kept
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.surgery import cut
from minitron_ray.weights.writing import write_checkpoint
from tests.contracts.networks import CONFIGS, Case


def magnitudes(case: Case, folder: Path) -> UnitScores:
    write_checkpoint(folder, case.weights.items(), case.config, dtype="float32")
    return WeightMagnitude().score(Checkpoint(folder), case.family, case.arch)


def squares(case: Case, kept: Kept) -> float:
    plain = tuple(replace(tensor, rescaled=None) for tensor in case.family.tensors)
    tensors = cut(case.weights, replace(case.family, tensors=plain), case.arch, kept)
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values())


def without(size: int, unit: int) -> tuple[int, ...]:
    return tuple(other for other in range(size) if other != unit)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_units_magnitude_is_what_a_cut_takes_away(name: str, tmp_path: Path) -> None:
    """The oracle is the cut itself: the squares of all weights, less those left without the unit."""
    case = Case.of(name)
    scores, arch, whole = magnitudes(case, tmp_path), case.arch, Kept.whole(case.arch)
    total = squares(case, whole)

    def lost(**change: object) -> float:
        return total - squares(case, replace(whole, **change))  # type: ignore[arg-type]

    unit = 3
    assert scores.hidden[unit] ** 2 == pytest.approx(lost(hidden=without(arch.hidden, unit)), rel=1e-4)
    if scores.mlp is not None:
        expected = lost(mlp=(without(arch.mlp, unit),) * arch.layers)
        assert (scores.mlp[:, unit] ** 2).sum() == pytest.approx(expected, rel=1e-4)
    if scores.experts is not None and scores.expert_mlp is not None:
        experts = (without(arch.experts, unit),) * arch.layers
        assert (scores.experts[:, unit] ** 2).sum() == pytest.approx(lost(experts=experts), rel=1e-4)
        row = (without(arch.expert_mlp, unit),) * arch.experts
        expected = lost(expert_mlp=(row,) * arch.layers)
        assert (scores.expert_mlp[:, :, unit] ** 2).sum() == pytest.approx(expected, rel=1e-4)
    if case.per_head:
        heads = (without(arch.heads, unit),) * arch.layers
        assert (scores.heads[:, unit] ** 2).sum() == pytest.approx(lost(heads=heads), rel=1e-4)
        np.testing.assert_array_equal(scores.heads, scores.kv_heads)
    else:  # one head of every group, since each keeps equally many
        group = arch.heads_per_group
        heads = (tuple(head for head in range(arch.heads) if head % group),) * arch.layers
        assert (scores.heads[:, ::group] ** 2).sum() == pytest.approx(lost(heads=heads), rel=1e-4)


def test_a_broken_weight_is_named(tmp_path: Path) -> None:
    case = Case.of("llama")
    case.weights["model.layers.2.mlp.up_proj.weight"][5, 1] = float("nan")
    with pytest.raises(MinitronError, match=r"model.layers.2.mlp.up_proj.weight hold NaN or infinity"):
        magnitudes(case, tmp_path)


def test_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.of("phi3")
    whole = magnitudes(case, tmp_path / "a")
    assert PIECE > 1000
    monkeypatch.setattr("minitron_ray.importance.width.weight_magnitude.PIECE", 100)
    pieces = magnitudes(case, tmp_path / "b").axes()
    for axis, values in whole.axes().items():
        np.testing.assert_allclose(values, pieces[axis], rtol=1e-6)


def test_a_seed_decides_random_scores(tmp_path: Path) -> None:
    case = Case.of("qwen3_moe")
    checkpoint = Checkpoint(tmp_path)  # never opened

    def drawn(seed: int) -> dict[str, np.ndarray]:
        return Random(seed=seed).score(checkpoint, case.family, case.arch).axes()

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert {axis: values.shape for axis, values in first.items()} == {
        "hidden": (48,),
        "heads": (4, 6),
        "kv_heads": (4, 2),
        "experts": (4, 6),
        "expert_mlp": (4, 6, 24),
    }
    for axis, values in first.items():
        np.testing.assert_array_equal(values, again[axis])
        assert not np.array_equal(values, other[axis])
    assert Random(seed=0).label != Random(seed=1).label
