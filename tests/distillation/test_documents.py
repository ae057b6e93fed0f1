"""Documents that are kept apart: losses, divergences and gradients are those of the documents by themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.testing import assert_close

from minitron_ray.distillation.intermediate.hidden_states import HiddenStates
from minitron_ray.distillation.loop import Data, Recipe, Share, make_optimizer, train
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.objective import Objective
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.signal import StoredSignal
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.signals.top_k import TopK
from minitron_ray.distillation.state_loss import Intermediate, intermediate_of
from minitron_ray.distillation.teacher import (
    OnlineTeacher,
    SignalBlock,
    StoredTeacher,
    compute_block,
    write_signal,
)
from minitron_ray.evaluation.measure import measure
from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build

END, LENGTH, BATCH = 0, 16, 6
TOKENS = np.random.default_rng(3).integers(0, 256, (BATCH, LENGTH))
TOKENS[np.random.default_rng(4).random(TOKENS.shape) < 0.2] = END
CPU = torch.device("cpu")
STATES = intermediate_of((HiddenStates(),), None, family_of({"model_type": "llama"}), 4, 4)
assert STATES is not None
STATES = replace(STATES, weight=1.0)  # a dynamic weight is of a whole sequence
SHARE = Share(device=CPU, dtype=torch.float32, micro_batch=4)


def model(folder: Path, separator: int | None = END, noise: float = 0.0) -> Headless:
    checkpoint = Checkpoint(folder)
    built = build(checkpoint.config, checkpoint, trainable=noise > 0)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters() if noise else ():
            parameter.add_(torch.randn(parameter.shape, generator=source) * noise)
    return Headless(built, separator)


def documents(row: np.ndarray) -> list[Tensor]:
    """Those in a sequence that predict anything."""
    parts = np.split(row, np.flatnonzero(row == END) + 1)
    return [torch.from_numpy(part)[None] for part in parts if len(part) > 1]


PREDICTIONS = sum(part.shape[1] - 1 for row in TOKENS for part in documents(row))


def summed(objective: Objective) -> Tensor:
    """All terms over all documents, each run by itself."""
    each = [torch.stack(objective.terms([0], part)) for row in TOKENS for part in documents(row)]
    return torch.stack(each).sum(0)


@pytest.mark.parametrize(
    ("loss", "states"), [(ForwardKL(), None), (CrossEntropy(), None), (ForwardKL(), STATES)], ids=str
)
def test_a_step_learns_what_the_documents_by_themselves_teach(
    loss: DistillationLoss, states: Intermediate | None, tiny_llama: Path
) -> None:
    assert PREDICTIONS < BATCH * (LENGTH - 1)
    found, gradients = [], []
    for separator in (END, None):
        student = model(tiny_llama, separator, noise=0.05)
        teacher = OnlineTeacher(model(tiny_llama, separator))
        objective = Objective(student, teacher, loss, states, torch.float32)
        if separator is None:
            terms = summed(objective)
        else:
            terms = torch.stack(objective.terms(range(BATCH), torch.from_numpy(TOKENS)))
        terms[0].backward()
        found.append(terms.detach())
        gradients.append({name: weight.grad for name, weight in student.named_parameters()})
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_loss_of_training_is_by_the_tokens_that_are_predicted(micro_batch: int, tiny_llama: Path) -> None:
    recipe = Recipe(
        loss=CrossEntropy(),
        schedule=Schedule(peak=1e-3, minimum=0.0, warmup=0.0, tokens=BATCH * LENGTH),
        batch=BATCH,
        sequence_length=LENGTH,
        weight_decay=0.0,
        betas=(0.9, 0.95),
        clip=1e9,
    )
    data = Data(batch=lambda step: np.arange(BATCH), sequences=lambda i: TOKENS[i])
    student = model(tiny_llama, noise=0.05)
    expected = summed(Objective(model(tiny_llama, None, 0.05), None, CrossEntropy(), None, torch.float32))
    share = replace(SHARE, micro_batch=micro_batch)
    (step,) = train(student, make_optimizer(student, recipe), None, data, recipe, share)
    assert step.loss == pytest.approx(expected[0].item() / PREDICTIONS, rel=1e-5)


def test_measured_losses_are_weighted_by_the_tokens_of_each_document(tiny_llama: Path) -> None:
    student, teacher = model(tiny_llama, noise=0.05), model(tiny_llama)
    online = OnlineTeacher(teacher)
    found = measure(
        student,
        TOKENS,
        range(BATCH),
        dtype=torch.float32,
        device=CPU,
        batch=4,
        teacher_hidden=online.hidden,
        teacher_head=online.head,
        separator=END,
    )
    losses, divergences = [], []
    for row in TOKENS:
        own, others, labels = [], [], []
        for part in documents(row):
            with torch.no_grad():
                own.append(student.model(part).logits[0, :-1])
                others.append(teacher.model(part).logits[0, :-1])
            labels.append(part[0, 1:])
        logs, targets = torch.cat(own).log_softmax(-1), torch.cat(others).log_softmax(-1)
        losses.append(cross_entropy(torch.cat(own), torch.cat(labels)).item())
        divergences.append(kl_div(logs, targets, log_target=True, reduction="batchmean").item())
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(found.divergences, divergences, rtol=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("signal", "near"), [(FinalHidden(), 1e-6), (TopK(k=256), 1e-3)], ids=str)
def test_a_stored_teacher_teaches_as_the_running_one(
    signal: StoredSignal, near: float, tiny_llama: Path, tmp_path: Path
) -> None:
    """Of the likeliest tokens all are stored, so that only their rounding differs."""
    student, teacher = model(tiny_llama, noise=0.05), model(tiny_llama)
    block = SignalBlock(folder=tmp_path, signal=signal, sequences=list(range(BATCH)))
    compute_block(block, tmp_path, teacher, TOKENS.__getitem__, dtype=torch.float32, batch=4, seed=0)
    write_signal(tmp_path, [block])
    found = [
        Objective(student, one, ForwardKL(), None, torch.float32).terms(
            range(BATCH), torch.from_numpy(TOKENS)
        )[0]
        for one in (StoredTeacher(tmp_path, teacher.head), OnlineTeacher(teacher))
    ]
    assert_close(found[0], found[1], rtol=near, atol=near)
