"""The soft cap of Gemma 2's logits reaches every place where logits are made of final hidden states."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close
from transformers import PreTrainedModel

from minitron_ray.distillation.fused_head import fused_head_loss
from minitron_ray.distillation.loop import Data, Recipe, Share, train
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.teacher import (
    OnlineTeacher,
    SignalBlock,
    StoredTeacher,
    TeacherSignal,
    compute_block,
    write_signal,
)
from minitron_ray.evaluation.measure import measure
from minitron_ray.models.families import family_of
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build

GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "final_logit_softcapping": 2.0,
}
CPU = torch.device("cpu")
SEQUENCES = np.random.default_rng(0).integers(0, 64, (6, 10))
IDS = torch.from_numpy(SEQUENCES)


def gemma(seed: int, **change: float | None) -> PreTrainedModel:
    config = {**GEMMA2, **change}
    family, source = family_of(config), torch.Generator().manual_seed(seed)
    shapes = family.shapes(family.read(config))
    return build(
        config, {n: torch.randn(s, generator=source) * 0.4 for n, s in shapes.items()}, trainable=True
    )


def teacher_signal(kind: str, folder: Path) -> tuple[TeacherSignal, PreTrainedModel]:
    model = gemma(1, final_logit_softcapping=3.0).eval().requires_grad_(False)
    if kind == "online":
        return OnlineTeacher(Headless(model)), model
    block = SignalBlock(folder=folder, signal=FinalHidden(), sequences=range(6))
    compute_block(block, folder, Headless(model), SEQUENCES.__getitem__, dtype=torch.float32, batch=4, seed=0)
    write_signal(folder, [block])
    cap = family_of(GEMMA2).softcap_of({**GEMMA2, "final_logit_softcapping": 3.0})
    return StoredTeacher(folder, model.lm_head.weight, cap), model


def plain_loss(student: PreTrainedModel, teacher: PreTrainedModel, loss: DistillationLoss) -> torch.Tensor:
    """The same out of the models' own logits, by autograd."""
    logits = student(IDS).logits[:, :-1].flatten(0, 1)
    labels = IDS[:, 1:].flatten()
    if not loss.needs_teacher:
        return functional.cross_entropy(logits, labels, reduction="sum")
    target = teacher(IDS).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="sum")


@pytest.mark.parametrize("kind", ["online", "stored"])
@pytest.mark.parametrize("loss", [CrossEntropy(), ForwardKL()], ids=lambda loss: loss.kind)
def test_fused_loss_and_gradients_are_those_of_the_models_logits(
    kind: str, loss: DistillationLoss, tmp_path: Path
) -> None:
    signal, teacher = teacher_signal(kind, tmp_path)
    student, copy = gemma(2), gemma(2)
    headless = Headless(student)
    use = partial(
        fused_head_loss,
        input_ids=IDS,
        loss=loss,
        dtype=torch.float32,
        teacher_hidden=signal.hidden(range(6), IDS),
        teacher_head=signal.head,
        softcap=headless.softcap,
        teacher_softcap=signal.softcap,
    )
    value = headless(IDS, use)
    value.backward()
    expected = plain_loss(copy, teacher, loss)
    expected.backward()
    assert_close(value, expected)
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    for name, parameter in copy.named_parameters():
        assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_the_loop_trains_on_the_capped_logits(tmp_path: Path) -> None:
    signal, teacher = teacher_signal("stored", tmp_path)
    student, copy = gemma(2), gemma(2)
    recipe = Recipe(
        loss=ForwardKL(),
        schedule=Schedule(peak=1e-3, minimum=0.0, warmup=0.0, tokens=60),
        batch=6,
        sequence_length=10,
        weight_decay=0.0,
        betas=(0.9, 0.95),
        clip=1e9,
    )
    data = Data(batch=lambda step: np.arange(6), sequences=lambda indices: SEQUENCES[indices])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    share = Share(device=CPU, dtype=torch.float32, micro_batch=4)
    (step,) = train(Headless(student), optimizer, signal, data, recipe, share)
    assert step.loss == pytest.approx(plain_loss(copy, teacher, recipe.loss).item() / (6 * 9), rel=1e-4)


@pytest.mark.parametrize("kind", ["online", "stored"])
def test_measurement_is_of_the_models_logits(kind: str, tmp_path: Path) -> None:
    signal, teacher = teacher_signal(kind, tmp_path)
    student = gemma(2).eval()
    measured = measure(
        Headless(student),
        SEQUENCES,
        range(6),
        dtype=torch.float32,
        device=CPU,
        batch=4,
        teacher_hidden=signal.hidden,
        teacher_head=signal.head,
        teacher_softcap=signal.softcap,
    )
    with torch.no_grad():
        entropy = plain_loss(student, teacher, CrossEntropy()) / (6 * 9)
        divergence = plain_loss(student, teacher, ForwardKL()) / (6 * 9)
    assert measured.loss == pytest.approx(entropy.item(), rel=1e-5)
    assert measured.divergence == pytest.approx(divergence.item(), rel=1e-4)


def test_the_cap_is_the_one_stock_transformers_takes() -> None:
    family, absent = family_of(GEMMA2), {k: v for k, v in GEMMA2.items() if k != "final_logit_softcapping"}
    assert family.softcap_of(absent) == 30.0 == build_cap(absent)
    assert family.softcap_of({**absent, "final_logit_softcapping": None}) is None
    assert Headless(gemma(0, final_logit_softcapping=None)).softcap is None
    assert Headless(gemma(0)).softcap == 2.0
    assert family_of({"model_type": "llama"}).softcap_of({}) is None


def build_cap(config: dict[str, object]) -> float | None:
    """What the stock config has where nothing is stated."""
    from transformers import AutoConfig

    attributes = {name: value for name, value in config.items() if name != "model_type"}
    cap: float | None = AutoConfig.for_model("gemma2", **attributes).final_logit_softcapping
    return cap
