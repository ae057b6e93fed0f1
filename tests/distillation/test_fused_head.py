"""The fused head equals the plain computation, in value and gradient, and does not hold the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_ray.distillation.fused_head import fused_head_loss
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.weights import vocabulary


def tensors(samples: int = 3, tokens: int = 17) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(samples, tokens, 8, requires_grad=True),
        "head": torch.randn(50, 8, requires_grad=True),
        "input_ids": torch.randint(0, 50, (samples, tokens)),
        "teacher_hidden": torch.randn(samples, tokens, 12),
        "teacher_head": torch.randn(50, 12),
    }


def plain_kl(t: dict[str, Tensor], temperature: float) -> Tensor:
    student = (t["hidden"] @ t["head"].T)[:, :-1] / temperature
    teacher = (t["teacher_hidden"] @ t["teacher_head"].T)[:, :-1] / temperature
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)


def plain_ce(t: dict[str, Tensor]) -> Tensor:
    logits = (t["hidden"] @ t["head"].T)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), t["input_ids"][:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_forward_kl_equals_torch(temperature: float) -> None:
    ours, theirs = tensors(), tensors()
    loss = fused_head_loss(loss=ForwardKL(temperature=temperature), dtype=torch.float32, **ours)
    expected = plain_kl(theirs, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    for name in ("hidden", "head"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


def test_cross_entropy_equals_torch() -> None:
    ours, theirs = tensors(samples=9), tensors(samples=9)
    loss = fused_head_loss(
        ours["hidden"], ours["head"], ours["input_ids"], loss=CrossEntropy(), dtype=torch.float32
    )
    plain_ce(theirs).backward()
    loss.backward()
    torch.testing.assert_close(loss, plain_ce(theirs))
    torch.testing.assert_close(ours["hidden"].grad, theirs["hidden"].grad)
    torch.testing.assert_close(ours["head"].grad, theirs["head"].grad)


def test_divergence_of_a_model_from_itself_is_zero_with_zero_gradient() -> None:
    t = tensors()
    t["teacher_hidden"], t["teacher_head"] = t["hidden"].detach(), t["head"].detach()
    loss = fused_head_loss(loss=ForwardKL(), dtype=torch.float32, **t)
    loss.backward()
    assert abs(loss.item()) < 1e-4
    assert t["hidden"].grad is not None and t["hidden"].grad.abs().max() < 1e-5


def test_the_last_position_predicts_nothing() -> None:
    t = tensors()
    loss = fused_head_loss(loss=ForwardKL(), dtype=torch.float32, **t)
    loss.backward()
    assert t["hidden"].grad is not None
    assert t["hidden"].grad[:, -1].abs().max() == 0
    assert t["hidden"].grad[:, -2].abs().max() > 0


def test_forward_kl_without_a_teacher_is_refused() -> None:
    t = tensors()
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        fused_head_loss(t["hidden"], t["head"], t["input_ids"], loss=ForwardKL(), dtype=torch.float32)


def test_sequence_scores_equal_torch() -> None:
    t = tensors()
    losses, divergences = vocabulary.sequence_scores(
        t["hidden"], t["head"], t["input_ids"], t["teacher_hidden"], t["teacher_head"]
    )
    predictions = t["input_ids"].shape[1] - 1
    assert divergences is not None
    torch.testing.assert_close(
        losses.sum() * predictions, plain_ce(t).detach().double(), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        divergences.sum() * predictions, plain_kl(t, 1.0).detach().double(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("own", "others"), [(50, 44), (44, 50)])
def test_rows_beyond_the_common_vocabulary_take_no_part(own: int, others: int) -> None:
    """Against the plain computation on logits that are sliced to the first 44."""
    ours, theirs = tensors(), tensors()
    for t in (ours, theirs):
        t["head"] = t["head"].detach()[:own].clone().requires_grad_()
        t["teacher_head"], t["input_ids"] = t["teacher_head"][:others], t["input_ids"] % 44
    loss = fused_head_loss(loss=ForwardKL(), dtype=torch.float32, vocabulary=44, **ours)
    student, teacher = (
        (theirs[f"{whose}hidden"] @ theirs[f"{whose}head"].T)[:, :-1, :44].log_softmax(-1)
        for whose in ("", "teacher_")
    )
    expected = F.kl_div(student, teacher, reduction="sum", log_target=True)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    loss.backward()
    expected.backward()
    for name in ("hidden", "head"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-4, atol=1e-5)
    assert ours["head"].grad is not None and ours["head"].grad.shape == (own, 8)
    assert not ours["head"].grad[44:].any()

    losses, divergences = vocabulary.sequence_scores(
        ours["hidden"],
        ours["head"],
        ours["input_ids"],
        ours["teacher_hidden"],
        ours["teacher_head"],
        vocabulary=44,
    )
    assert divergences is not None
    torch.testing.assert_close(divergences.sum() * 16, expected.double(), rtol=1e-5, atol=1e-4)
    labels = ours["input_ids"][:, 1:, None]
    torch.testing.assert_close(
        losses, -student.gather(-1, labels).double().mean((1, 2)), rtol=1e-5, atol=1e-5
    )
