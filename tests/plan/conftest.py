"""Plans of experiments about the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment
from minitron_ray.plan import make_plan
from minitron_ray.plan.plan import Plan

MakePlan = Callable[..., Plan]
"""`make(text, *overrides)`, with overrides as after `--set`."""


@pytest.fixture
def make_tiny_plan(tmp_path: Path, tiny_llama: Path) -> MakePlan:
    config = json.loads((tiny_llama / "config.json").read_text())

    def make(text: str, *overrides: str) -> Plan:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return make_plan(load(path, Experiment, overrides)[0], config)

    return make
