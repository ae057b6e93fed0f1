"""`data.documents: apart` reaches whatever runs a model over sequences, and names what comes of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.events import EventBus
from minitron_ray.core.loading import load
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.teacher import write_signal
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment
from minitron_ray.results.cache import Cache
from minitron_ray.stages.evaluate import figures
from minitron_ray.stages.prepare import Prepared, prepare
from minitron_ray.stages.teacher import Library, compute
from minitron_ray.stages.trial import RungResult, retrain

CPU = torch.device("cpu")
END = 0
Prepare = Callable[..., Prepared]


@pytest.fixture
def prepared(tiny_llama: Path, tmp_path: Path) -> Prepare:
    """`prepared(*overrides)`: of a small experiment on texts of a line each."""
    for number in range(150):
        line = f"Text {number} is of {number % 7 * 'quite '}few words."
        (tmp_path / f"{number:03}.txt").write_text(line)
    (tmp_path / "x.yaml").write_text(
        f"""
name: tiny
teacher: {{path: {os.path.relpath(tiny_llama, tmp_path)}}}
data:
  source: {{kind: files, path: "*.txt"}}
  sequence_length: 32
  calibration: 4
  validation: 5
budget: {{parameters: 75k, tolerance: 30%}}
search:
  space: {{layers: 3..4, mlp: [64, 96]}}
  retrain: {{tokens: 512, batch: 4, rungs: 1}}
"""
    )

    def made(*overrides: str) -> Prepared:
        experiment, _ = load(tmp_path / "x.yaml", Experiment, overrides)
        cache = Cache(tmp_path / "results")
        return prepare(experiment, tmp_path, cache, EventBus(), StopSignal(), micro_batch=3)

    return made


def library_of(ready: Prepared, folder: Path) -> Library:
    cache = Cache(folder / "results")
    return Library(setting=ready.setting, inputs=ready.inputs, cache=cache)


def test_all_that_comes_of_the_text_has_another_name(prepared: Prepare, tmp_path: Path) -> None:
    plain, joined, apart = (
        prepared(*overrides) for overrides in ((), ("data.documents=joined",), ("data.documents=apart",))
    )
    assert plain.inputs == joined.inputs and plain.inputs.data == plain.setting.tokens().digest
    assert plain.setting.tokens_folder == apart.setting.tokens_folder  # the rows are the same
    assert apart.inputs.data not in (plain.inputs.data, plain.setting.tokens().digest)
    assert (plain.setting.separator, apart.setting.separator) == (None, END)
    blocks = [
        {block.folder for block in library_of(ready, tmp_path).blocks(FinalHidden())}
        for ready in (plain, apart)
    ]
    assert blocks[0] and not blocks[0] & blocks[1]


def test_validation_is_of_each_document_by_itself(prepared: Prepare) -> None:
    setting = prepared("data.documents=apart").setting
    share = setting.share(device=CPU)
    teacher = setting.online_teacher(share)
    found = setting.measure(None, share, teacher)
    expected, count = [], 0
    for row in setting.tokens().sequences(setting.splits.validation):
        logits, labels = [], []
        for part in np.split(row, np.flatnonzero(row == END) + 1):
            if len(part) > 1:
                logits.append(teacher.model.model(torch.from_numpy(part)[None]).logits[0, :-1])
                labels.append(torch.from_numpy(part[1:]))
        expected.append(cross_entropy(torch.cat(logits), torch.cat(labels)).item())
        count += len(torch.cat(labels))
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)
    assert count < 5 * 31
    assert {row["tokens"] for row in figures("teacher", "teacher", found, setting, 0)} == {count}


def test_trials_learn_the_same_from_the_stored_and_the_running_teacher(
    prepared: Prepare, tmp_path: Path
) -> None:
    ready = prepared("data.documents=apart", "search.signal.kind=final_hidden")
    setting, library = ready.setting, library_of(ready, tmp_path)
    share = setting.share(device=CPU)
    blocks = library.blocks(FinalHidden())
    compute(blocks, library, 0, lambda kind, **fields: None)
    write_signal(tmp_path, blocks)
    found: list[list[RungResult]] = []
    for teacher in (setting.stored_teacher(tmp_path, share), setting.online_teacher(share)):
        student = setting.headless(setting.start(share).model.requires_grad_(True))
        with torch.no_grad():
            student.head.mul_(0.9)  # something to learn
        found.append(retrain(setting, student, teacher, share, on_rung=lambda rung: None))
    for stored, online in zip(*found, strict=True):
        np.testing.assert_allclose(stored.losses, online.losses, rtol=1e-5)
        assert stored.val_divergence == pytest.approx(online.val_divergence, rel=1e-3)


def test_without_an_end_of_text_documents_cannot_be_apart(
    prepared: Prepare, tiny_llama: Path, tmp_path: Path
) -> None:
    """Of tokens as they stand nothing else would tell where one ends."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps({key: value for key, value in content.items() if not key.startswith("eos_token")})
        )
    np.save(tmp_path / "rows.npy", np.full((60, 32), 5))
    with pytest.raises(ConfigError, match="names no eos_token, which must end each document"):
        prepared("teacher.path=./model", "data.source={kind: tokens, path: rows.npy}", "data.documents=apart")
