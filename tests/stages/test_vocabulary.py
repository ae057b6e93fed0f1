"""Teacher and model to cut of one tokenizer, whose embeddings are padded to unlike numbers of rows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.events import EventBus
from minitron_ray.core.loading import load
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.objective import Objective
from minitron_ray.execution.stop import StopSignal
from minitron_ray.experiment import Experiment
from minitron_ray.results.cache import Cache
from minitron_ray.stages.prepare import prepare
from minitron_ray.stages.setting import Setting

Prepare = Callable[[Path, Path], Setting]


@pytest.fixture
def padded(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model with 264 rows for its 256 tokens, and other weights. The rows beyond would draw every
    prediction to them."""
    folder = tmp_path / "padded"
    shutil.copytree(tiny_llama, folder)
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(264, mean_resizing=False)
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.get_input_embeddings().weight[256:] = 3 * torch.randn(8, 48)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def prepared(tiny_text: Path, tmp_path: Path) -> Prepare:
    def made(teacher: Path, start: Path) -> Setting:
        (tmp_path / "x.yaml").write_text(
            f"""
name: tiny
teacher: {{path: {teacher}}}
start: {{path: {start}}}
precision: float32
data:
  source: {{kind: files, path: "{os.path.relpath(tiny_text, tmp_path)}/**/*.txt"}}
  sequence_length: 16
  calibration: 4
  validation: 5
shape: {{mlp: 64}}
distill: {{tokens: 640, batch: 4}}
"""
        )
        experiment, _ = load(tmp_path / "x.yaml", Experiment, ())
        cache = Cache(tmp_path / "results")
        return prepare(experiment, tmp_path, cache, EventBus(), StopSignal(), micro_batch=3).setting

    return made


def log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """By transformers, of the 256 tokens that both models have."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(ids).logits[:, :-1, :256].double().log_softmax(-1)


@pytest.mark.parametrize("larger", ["teacher", "start"])
def test_losses_are_over_the_common_vocabulary(
    larger: str, padded: Path, tiny_llama: Path, prepared: Prepare
) -> None:
    teacher, start = (padded, tiny_llama) if larger == "teacher" else (tiny_llama, padded)
    setting = prepared(teacher, start)
    assert setting.vocabulary == 256
    share, indices = setting.share(device=torch.device("cpu")), list(setting.splits.validation)
    ids = torch.from_numpy(setting.tokens().sequences(np.asarray(indices)))
    theirs, own = log_probabilities(teacher, ids), log_probabilities(start, ids)
    divergence = F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1)

    online, student = setting.online_teacher(share), setting.start(share)
    measured = setting.measure(student, share, online)
    labels = ids[:, 1:, None]
    np.testing.assert_allclose(measured.losses, -own.gather(-1, labels).mean((1, 2)), rtol=1e-4)
    assert measured.divergence == pytest.approx(divergence.mean().item(), rel=1e-3)
    alone = setting.measure(student, share)  # as where cuts are scored, without a teacher
    np.testing.assert_allclose(alone.losses, measured.losses, rtol=1e-6)
    of_teacher = setting.measure(None, share, online)
    np.testing.assert_allclose(of_teacher.losses, -theirs.gather(-1, labels).mean((1, 2)), rtol=1e-4)

    total = Objective(student, online, ForwardKL(), None, torch.float32).terms(indices, ids)[0]
    assert total.item() == pytest.approx(divergence.sum().item(), rel=1e-3)


def test_another_tokenizer_is_refused_before_any_text_is_read(
    padded: Path, tiny_llama: Path, prepared: Prepare
) -> None:
    path = padded / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    ids = whole["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(whole), encoding="utf-8")
    told = rf"tokenizer of {padded} \(256 tokens\) is not that of the teacher {tiny_llama} \(256 tokens\): '[ab]' is id"
    with pytest.raises(ConfigError, match=told):
        prepared(tiny_llama, padded)
    assert not list((padded.parent / "results").rglob("*.npy"))
