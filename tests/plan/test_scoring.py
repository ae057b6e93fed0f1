"""What scoring costs, against counters in the running network and against closed formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minitron_ray.core.loading import load
from minitron_ray.evaluation.task import Batch
from minitron_ray.experiment import Experiment
from minitron_ray.importance.depth.logit_mse import LogitMSE
from minitron_ray.importance.depth.perplexity import Perplexity
from minitron_ray.importance.removal import removal_values, score_layers
from minitron_ray.models.families import family_of
from minitron_ray.plan.scoring import depth_removals, removals, scoring_passes
from minitron_ray.search.shape import shape_of
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.fetch import given_config
from minitron_ray.weights.layerwise import Layerwise
from minitron_ray.weights.model import build

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


class Counted:
    """A network whose decoder layers count how often they are called."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        self.family = family_of(checkpoint.config)
        self.arch = self.family.read(checkpoint.config)
        model = build(checkpoint.config, checkpoint)
        self.calls = 0
        for layer in model.get_submodule(self.family.decoder_layers).children():
            layer.register_forward_hook(self._count)
        self.network = Layerwise(model, self.family)

    def _count(self, *_: object) -> None:
        self.calls += 1


@pytest.fixture(scope="module")
def counted(tiny_llama: Path) -> Counted:
    return Counted(tiny_llama)


BATCH = Batch(ids=np.arange(1, 17).reshape(2, 8))
SETS = st.lists(
    st.sets(st.integers(0, 3), min_size=1, max_size=3).map(lambda layers: tuple(sorted(layers))),
    min_size=1,
    max_size=6,
    unique=True,
)


@given(SETS)
def test_as_many_layers_are_applied_as_are_counted(counted: Counted, sets: list[tuple[int, ...]]) -> None:
    counted.calls = 0
    with torch.no_grad():
        values = removal_values(counted.network, [BATCH], Perplexity(), sets)
    found = removals(sets, counted.arch.layers)
    assert counted.calls == found.layers
    assert len(values) == found.outputs


@pytest.mark.parametrize("layers", [1, 4, 32])
def test_one_layer_at_a_time_takes_the_triangular_number(layers: int) -> None:
    """Without layer i the layers behind i are computed again: L + (L-1) + ... + 1."""
    found = removals([(i,) for i in range(layers)], layers)
    assert found.layers == layers * (layers + 1) // 2
    assert found.outputs == layers + 1


@pytest.mark.parametrize("fewest", [1, 2, 3])
def test_removing_one_after_the_other_takes_at_most_what_is_planned(counted: Counted, fewest: int) -> None:
    metric, outputs = LogitMSE(iterative=True), 0
    counted.calls = 0

    def measure(sets):  # type: ignore[no-untyped-def]
        nonlocal outputs
        outputs += 1 + len(sets)
        with torch.no_grad():
            return removal_values(counted.network, [BATCH], metric, sets)

    score_layers(metric, counted.arch.layers, fewest, measure)
    planned = depth_removals(metric, counted.arch.layers, fewest)
    assert outputs == planned.outputs
    assert 0.7 * planned.layers <= counted.calls <= planned.layers


def test_operations_are_those_that_torch_counts(counted: Counted, tiny_llama: Path) -> None:
    """Products of a removal pass, against torch's own counter, which leaves nothing but attention to chance:
    it counts the whole square of scores where causal attention needs half."""
    experiment = paper("importance.depth.kind=perplexity", "data.sequence_length=8", "data.calibration=2")
    students = [shape_of(counted.arch, {"layers": 3})]
    *_, passes = scoring_passes(experiment, counted.family, counted.arch, students)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        removal_values(counted.network, [BATCH], Perplexity(), [(i,) for i in range(4)])
    assert passes.tokens == BATCH.ids.size
    # 7 of 8 positions predict something and go through the head.
    assert passes.flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def paper(*overrides: str) -> Experiment:
    return load(EXPERIMENTS / "15b_to_8b.yaml", Experiment, overrides)[0]


def test_listening_takes_one_pass_without_the_head() -> None:
    family, arch = fifteen()
    [passes] = scoring_passes(paper(), family, arch, [shape_of(arch, {"layers": 29})])
    # 24 attention and MLP parameters a layer x 2, plus scores: performance figures of the 15B, in GF.
    per_token = 2 * 32 * (88_080_384 + 301_989_888) + 32 * 2 * 6144 * 4097
    assert passes.tokens == 1024 * 4096
    assert passes.flops_a_token == per_token


def test_removal_comes_on_top_with_a_head_for_each_output() -> None:
    family, arch = fifteen()
    students = [shape_of(arch, {"layers": 29})]
    heard, removed = scoring_passes(paper("importance.depth.kind=perplexity"), family, arch, students)
    layer, head = heard.flops_a_token / 32, 2 * 256_000 * 6144
    assert removed.flops_a_token == pytest.approx(32 * 33 / 2 * layer + 33 * head)
    # Naive removal would run all 31 other layers each time: 0.568 of it (L = 32, the head as 4 layers).
    naive = 32 * layer + head + 32 * (31 * layer + head)
    assert removed.flops_a_token / naive == pytest.approx(0.568, abs=0.005)


def test_rounds_are_passes_of_smaller_and_smaller_models() -> None:
    family, arch = fifteen()
    students = [shape_of(arch, {"hidden": 4096, "mlp": 16384})]
    first, more = scoring_passes(paper("importance.iterations=4"), family, arch, students)
    assert more.what == "3 more rounds"
    assert 1.5 * first.flops_a_token < more.flops_a_token < 3 * first.flops_a_token


def test_scores_that_need_no_pass_cost_none() -> None:
    family, arch = fifteen()
    experiment = paper("importance.width={kind: random}", "importance.depth={kind: perplexity}")
    [passes] = scoring_passes(experiment, family, arch, [shape_of(arch, {"layers": 29})])
    assert passes.what == "33 passes without layers"


def test_a_tasks_questions_are_not_known_before_they_are_read() -> None:
    family, arch = fifteen()
    experiment = paper(
        "importance.depth={kind: task, task: {kind: multiple_choice, path: ./questions.jsonl}}"
    )
    *_, passes = scoring_passes(experiment, family, arch, [shape_of(arch, {"layers": 29})])
    assert passes.what == "33 passes without layers (questions of its own, counted as so many)"


def fifteen():  # type: ignore[no-untyped-def]
    config = given_config(paper().teacher.config, EXPERIMENTS)
    assert config is not None
    family = family_of(config)
    return family, family.read(config)
