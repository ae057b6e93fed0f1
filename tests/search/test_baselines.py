"""Which shapes the baselines train: rules that anybody can follow by hand."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment
from minitron_ray.plan import Plan, make_plan
from minitron_ray.search.baselines import affordable, best_of, drawn, largest

SEARCH = """
name: x
teacher: {path: ./teacher}
data: {source: {kind: files, path: t}, sequence_length: 32, validation: 8}
budget: {parameters: 75k, tolerance: 20%}
search:
  space: {layers: 2..4, mlp: 32..96 by 8, heads: [3, 6]}
  retrain: {tokens: 2048, rungs: 3}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(SEARCH)
    return path


def planned(file: Path, tiny_llama: Path, *overrides: str) -> Plan:
    config = json.loads((tiny_llama / "config.json").read_text())
    return make_plan(load(file, Experiment, overrides)[0], config)


@pytest.mark.parametrize(
    ("spent", "count"),
    [(0, 1), (1, 1), (100, 1), (101, 2), (799, 8), (800, 8), (801, 9), (10_000, 12)],
)
def test_the_lot_has_at_least_the_searchs_tokens_and_no_shape_twice(spent: int, count: int) -> None:
    assert affordable(spent, 100, 12) == count


def test_a_draw_depends_on_the_seed_and_grows_by_adding(file: Path, tiny_llama: Path) -> None:
    feasible = planned(file, tiny_llama).feasible
    draws = [[row.candidate.id for row in drawn(feasible, count, 5)] for count in range(len(feasible) + 1)]
    assert len(feasible) > 10
    assert all(longer[: len(draw)] == draw for draw, longer in pairwise(draws))
    assert sorted(draws[-1]) == sorted(row.candidate.id for row in feasible)
    firsts = {drawn(feasible, 1, seed)[0].candidate.id for seed in range(400)}
    assert len(firsts) == len(feasible), "a shape that is never drawn first"


def test_the_largest_are_those_that_no_other_exceeds(file: Path, tiny_llama: Path) -> None:
    feasible = planned(file, tiny_llama).feasible
    for count in (False, True):
        found = largest(feasible, non_embedding=count)
        sizes = [row.non_embedding_parameters if count else row.parameters for row in feasible]
        kept = [row.non_embedding_parameters if count else row.parameters for row in found]
        assert kept == sorted(sizes, reverse=True)[:10]
    assert largest(feasible) == largest(tuple(reversed(feasible)))
    assert len(largest(feasible[:3])) == 3


def test_the_best_cut_is_never_one_without_a_loss(file: Path, tiny_llama: Path) -> None:
    rows = planned(file, tiny_llama).feasible[:4]
    names = [row.candidate.id for row in rows]
    losses = dict(zip(names, (math.nan, 3.0, None, 2.5), strict=True))
    assert best_of(rows, losses) is rows[3]
    assert best_of(rows, losses | {names[3]: 3.0}) is rows[1], "among equals the first"
    assert best_of(rows, dict.fromkeys(names)) is rows[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[random, random]", r"search\.baselines: random is named twice; .* remove one"),
        ("random", r"search\.baselines: expected a list, found 'random'"),
        ("[magnitud]", r"search\.baselines\[0\]: .*'scratch', found 'magnitud'; did you mean 'magnitude'"),
    ],
)
def test_a_mistaken_baseline_is_named(file: Path, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(file, Experiment, [f"search.baselines={value}"])


def test_the_stage_is_there_on_request_and_costs_what_it_trains(file: Path, tiny_llama: Path) -> None:
    without = planned(file, tiny_llama, "search.halving=null")
    assert "baselines" not in without.stages
    plan = planned(file, tiny_llama, "search.halving=null", "search.baselines=[scratch, random]")
    stages = plan.stages
    assert stages[stages.index("search") + 1] == "baselines"
    costs = {cost.stage: cost for cost in plan.costs()}
    assert costs["baselines"].tokens == costs["search"].tokens + 2048
    assert costs["baselines"].flops > costs["search"].flops
    assert "8 by lot" in costs["baselines"].what
