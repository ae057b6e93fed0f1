"""A trial that the machine has too little memory for says so, and what to lower."""

from __future__ import annotations

import json
import multiprocessing
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron_ray.core.errors import EnvironmentFailure, MinitronError
from minitron_ray.data.splits import Splits
from minitron_ray.distillation.engine import Engine
from minitron_ray.execution.cluster import GroupSize
from minitron_ray.execution.settings import Resources
from minitron_ray.experiment import Experiment
from minitron_ray.importance.scores import Scores
from minitron_ray.search.space import Candidate
from minitron_ray.stages.setting import Setting
from minitron_ray.stages.trial import Objective, told_of_memory
from tests.settings import setting_of

WIDE, ROOM = 40_000, 4 * 2**20
CANDIDATE = Candidate(layers=1, hidden=48, heads=6, kv_heads=3, mlp=WIDE - 8)


@pytest.fixture(scope="module")
def setting(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Of a teacher with one layer whose MLP has three matrices of 7 MiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    model = folder / "model"
    config = json.loads((tiny_llama / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "intermediate_size": WIDE}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((tiny_llama / name).read_bytes())
    experiment = Experiment.model_validate(
        {
            "name": "x",
            "precision": "float32",
            "teacher": {"path": str(model)},
            "data": {"source": {"kind": "files", "path": f"{tiny_text}/**/*.txt"}, "sequence_length": 32},
            "budget": {"parameters": "1M..9M"},
            "search": {"space": {"mlp": [WIDE - 8]}, "retrain": {"tokens": 256, "rungs": 1}},
        }
    )
    return setting_of(
        experiment, model, folder, Splits(calibration=range(4), validation=range(4, 8), train=range(8, 40))
    )


def _trial(setting: Setting, out: Path) -> None:
    """Up to rung 0 all memory is there; then little more than what the process has by now."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(0).random
    scores = Scores(
        hidden=draw(48), heads=draw((1, 6)), kv_heads=draw((1, 3)), mlp=draw((1, WIDE)), layers=draw(1)
    )
    objective = Objective(
        setting=setting, scores=scores, candidates={"c": CANDIDATE}, signal=None, checkpoints=None
    )

    def on_rung(rung: dict[str, Any]) -> None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.RLIM_INFINITY))

    class Reporter:
        def __call__(self, kind: str, **fields: Any) -> None:
            pass

        def stop_requested(self) -> bool:
            return False

    try:
        objective("c", on_rung, Reporter())
        told = "none"
    except MinitronError as error:
        told = f"{type(error).__name__}: {error.message}"
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    out.write_text(told)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limit of a process's memory")
def test_a_trial_without_memory_names_its_shape_and_what_to_lower(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "told"
    process = multiprocessing.get_context("spawn").Process(target=_trial, args=(setting, out))
    process.start()
    process.join()
    told = out.read_text()
    assert told.startswith("EnvironmentFailure: 1L 48H 6h/3 39992m at micro_batch 2 needs more memory"), told
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate" in told
    assert "lower micro_batch or concurrent_trials, set activation_checkpointing: true" in told
    assert "in the cluster file, then run the same command again" in told and "\n" not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU's trials may lower")
def test_what_is_at_its_least_already_is_not_to_be_lowered(setting: Setting) -> None:
    least = replace(setting, micro_batch=1, engine=Engine(recompute=True))
    with pytest.raises(EnvironmentFailure) as caught, told_of_memory(least, "1L", None):
        torch.empty(2**50)
    assert "; lower concurrent_trials or raise trial_workers in the cluster file" in caught.value.message
    assert "at micro_batch 1 needs" in caught.value.message
    with (
        pytest.raises(EnvironmentFailure) as caught,
        told_of_memory(least, "1L", None, "set devices with less memory"),
    ):
        torch.empty(2**50)
    assert "; lower concurrent_trials or set devices with less memory in the cluster" in caught.value.message


def test_a_group_of_gpus_is_not_told_to_share_the_machines_memory(setting: Setting, tmp_path: Path) -> None:
    """Whatever this process has: it only waits for the group's."""
    for gpus, said in ((1, "; lower micro_batch, set"), (0, "; lower micro_batch or concurrent_trials, set")):
        group = GroupSize(workers=2, each=Resources(cpus=1, gpus=gpus), storage=tmp_path)
        with pytest.raises(EnvironmentFailure) as caught, told_of_memory(setting, "1L", group):
            torch.empty(2**50)
        assert said in caught.value.message


def test_another_fault_of_a_trial_stays_what_it_is(setting: Setting) -> None:
    with (
        pytest.raises(RuntimeError, match=r"size mismatch|same size|inconsistent"),
        told_of_memory(setting, "1L", None),
    ):
        torch.ones(2) @ torch.ones(3)
