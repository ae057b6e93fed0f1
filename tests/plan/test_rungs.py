"""When halving begins: optimizer steps counted by hand, and what is warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment
from minitron_ray.plan.rungs import early_halving, first_halving


def experiment(tokens: int, rungs: int, batch: int, **search: Any) -> Experiment:
    """Sequences of 16 tokens."""
    retrain = {"tokens": tokens, "rungs": rungs, "batch": batch, **search.pop("retrain", {})}
    return Experiment.model_validate(
        {
            "name": "small",
            "teacher": {"path": "./teacher"},
            "data": {"source": {"kind": "files", "path": "x"}, "sequence_length": 16},
            "budget": {"parameters": "10k..200k"},
            "search": {"space": {"layers": "2..4"}, "trials": 8, "retrain": retrain, **search},
        }
    )


@pytest.mark.parametrize(
    ("tokens", "rungs", "batch", "reduction", "first"),
    [
        (640, 2, 4, 2, 5),  # 10 steps of 64 tokens, half of them
        (640, 3, 4, 2, 3),  # a quarter is 2.5 steps, in whole ones 3
        (640, 3, 2, 2, 5),
        (640, 2, 4, 4, 3),
        (64, 2, 4, 2, None),  # one step: both rungs are the same
        (640, 1, 4, 2, None),
    ],
)
def test_the_first_halving_in_optimizer_steps(
    tokens: int, rungs: int, batch: int, reduction: float, first: int | None
) -> None:
    found = experiment(tokens, rungs, batch, halving={"reduction": reduction})
    assert first_halving(found) == first
    assert (early_halving(found) is not None) == (first is not None and first < 5)
    assert first_halving(experiment(tokens, rungs, batch, halving=None)) is None


def test_what_is_shipped_and_what_is_not_said_halve_late_enough() -> None:
    files = sorted(Path(__file__).parents[2].glob("experiments/*.yaml"))
    searches = [found for file in files if (found := load(file, Experiment)[0]).search is not None]
    assert len(searches) > 3
    assert [found.name for found in searches if early_halving(found) is not None] == []
    minimal = experiment(640, 3, 4).model_dump(exclude={"search"}) | {"search": {"space": {"layers": "2..4"}}}
    minimal["data"]["sequence_length"] = 256
    assert first_halving(Experiment.model_validate(minimal)) == 8
    assert early_halving(Experiment.model_validate(minimal)) is None


def test_the_warning_names_what_to_change() -> None:
    said = early_halving(experiment(640, 3, 4, halving={"reduction": 2}))
    assert said is not None and "\n" not in said
    assert "after 3 optimizer steps of 10" in said and "5 or more" in said
    assert said.endswith(
        "take fewer search.retrain.rungs, more search.retrain.tokens or a smaller search.retrain.batch"
    )
    alone = early_halving(experiment(32, 2, 1, halving={"reduction": 2}))
    assert alone is not None and "after 1 optimizer step of 2" in alone and "batch" not in alone


def test_a_halving_within_the_warmup_is_early_however_many_steps_it_has() -> None:
    """Of 100 steps 40 warm up, and a quarter of them is 25."""
    warm = {"halving": {"reduction": 2}, "retrain": {"warmup": 0.4}}
    said = early_halving(experiment(6400, 3, 4, **warm))
    assert said is not None and "after 25 optimizer steps of 100" in said and "40 or more" in said
    assert early_halving(experiment(6400, 2, 4, **warm)) is None, "50 are behind it"
