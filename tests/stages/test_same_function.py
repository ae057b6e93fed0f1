"""`export.as`: whatever is taken as another model type is shown to be the same function, or refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.events import EventBus
from minitron_ray.core.loading import load
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment
from minitron_ray.models.families import rewritten
from minitron_ray.models.families.llama import FAMILY
from minitron_ray.results.cache import Cache
from minitron_ray.stages.prepare import prepare
from minitron_ray.stages.same_function import prove_same_function
from minitron_ray.stages.setting import Setting

Make = Callable[[Path, Path], Setting]


@pytest.fixture
def mistral(tiny_llama: Path, tmp_path: Path) -> Path:
    """The same weights as a Mistral."""
    folder = tmp_path / "mistral"
    shutil.copytree(tiny_llama, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(rewritten(json.loads(path.read_text()), "mistral")))
    return folder


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table by which a Llama becomes a Mistral that looks back four tokens only."""
    monkeypatch.setitem(FAMILY.as_types, "mistral", {**FAMILY.as_types["mistral"], "sliding_window": 4})  # type: ignore[arg-type]


@pytest.fixture
def setting(tiny_text: Path, tmp_path: Path) -> Make:
    def made(teacher: Path, start: Path) -> Setting:
        source = f"{os.path.relpath(tiny_text, tmp_path)}/**/*.txt"
        (tmp_path / "x.yaml").write_text(
            f"""
name: tiny
precision: float32
teacher: {{path: {teacher}}}
start: {{path: {start}}}
data: {{source: {{kind: files, path: "{source}"}}, sequence_length: 16, calibration: 4, validation: 5}}
shape: {{mlp: 64}}
export: {{as: mistral}}
"""
        )
        experiment, _ = load(tmp_path / "x.yaml", Experiment)
        cache = Cache(tmp_path / "results")
        return prepare(experiment, tmp_path, cache, EventBus(), StopSignal(), micro_batch=2).setting

    return made


def prove(setting: Setting) -> None:
    prove_same_function(setting, lambda kind, **fields: None)


def test_a_llama_is_a_mistral(setting: Make, tiny_llama: Path) -> None:
    prove(setting(tiny_llama, tiny_llama))


@pytest.mark.usefixtures("wrong")
def test_each_model_that_becomes_another_function_is_refused(
    setting: Make, tiny_llama: Path, mistral: Path
) -> None:
    """What is a Mistral already needs no proof, and a student of it no other type."""
    other = r"as mistral gives other logits than as llama \(largest difference .*\); leave export\.as out"
    with pytest.raises(ConfigError, match=f"export.as: the model to cut {other}"):
        prove(setting(mistral, tiny_llama))
    with pytest.raises(ConfigError, match=f"export.as: the teacher {other}"):
        prove(setting(tiny_llama, mistral))
    prove(setting(mistral, mistral))
