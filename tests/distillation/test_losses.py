"""Every loss against a plain formula differentiated by autograd, at ordinary and at extreme logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.kinds import Section, plugins
from minitron_ray.core.loading import load
from minitron_ray.distillation import Loss, fused_head
from minitron_ray.distillation.fused_head import fused_head_loss
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.losses.cosine import Cosine
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.losses.jsd import JSD
from minitron_ray.distillation.losses.mixture import Mixture, Term
from minitron_ray.distillation.losses.mse import MSE
from minitron_ray.distillation.losses.reverse_kl import ReverseKL
from minitron_ray.distillation.targets import SparseTargets
from minitron_ray.weights import vocabulary

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of probabilities, as in a textbook."""
    return (p * (p / q).log()).sum(-1)


def mixed(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


CASES: list[tuple[DistillationLoss, Formula]] = [
    (CrossEntropy(), lambda s, t, y: F.cross_entropy(s, y, reduction="none")),
    (ForwardKL(), lambda s, t, y: kl(t.softmax(-1), s.softmax(-1))),
    (ForwardKL(temperature=3), lambda s, t, y: kl((t / 3).softmax(-1), (s / 3).softmax(-1))),
    (ReverseKL(), lambda s, t, y: kl(s.softmax(-1), t.softmax(-1))),
    (ReverseKL(temperature=0.5), lambda s, t, y: kl((2 * s).softmax(-1), (2 * t).softmax(-1))),
    (JSD(), lambda s, t, y: mixed(t.softmax(-1), s.softmax(-1), 0.5)),
    (JSD(beta=0.1, temperature=2), lambda s, t, y: mixed((t / 2).softmax(-1), (s / 2).softmax(-1), 0.1)),
    (MSE(), lambda s, t, y: (s.softmax(-1) - t.softmax(-1)).square().sum(-1)),
    (MSE(temperature=2), lambda s, t, y: ((s / 2).softmax(-1) - (t / 2).softmax(-1)).square().sum(-1)),
    (MSE(on="logits"), lambda s, t, y: F.mse_loss(centred(s), centred(t), reduction="none").mean(-1)),
    (Cosine(), lambda s, t, y: 1 - F.cosine_similarity(s.softmax(-1), t.softmax(-1))),
    (
        Cosine(temperature=2),
        lambda s, t, y: 1 - F.cosine_similarity((s / 2).softmax(-1), (t / 2).softmax(-1)),
    ),
    (Cosine(on="logits"), lambda s, t, y: 1 - F.cosine_similarity(centred(s), centred(t))),
    (
        Mixture(terms=(Term(weight=0.3, loss=CrossEntropy()), Term(weight=2, loss=ReverseKL()))),
        lambda s, t, y: 0.3 * F.cross_entropy(s, y, reduction="none") + 2 * kl(s.softmax(-1), t.softmax(-1)),
    ),
]
NAMES = [f"{loss.kind}-{index}" for index, (loss, _) in enumerate(CASES)]


def example(dtype: torch.dtype = torch.float64, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    student, teacher = (scale * torch.randn(6, 11, dtype=dtype) for _ in range(2))
    return student, teacher, torch.randint(0, 11, (6,))


def test_every_loss_has_a_case() -> None:
    assert {loss.kind for loss, _ in CASES} == set(plugins("minitron_ray.distillation.losses"))


@pytest.mark.parametrize(("loss", "formula"), CASES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_value_and_gradient_equal_autograd(
    loss: DistillationLoss, formula: Formula, dtype: torch.dtype
) -> None:
    student, teacher, labels = example(dtype)
    value, gradient = loss.value_and_gradient(student.clone(), teacher.clone(), labels)
    leaf = student.double().requires_grad_()
    expected = formula(leaf, teacher.double(), labels)
    expected.sum().backward()
    assert value.dtype == gradient.dtype == dtype
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(value.double(), expected.detach(), **tolerance)
    torch.testing.assert_close(gradient.double(), leaf.grad, **tolerance)


@pytest.mark.parametrize(
    ("loss", "formula", "sparse"),
    [(loss, formula, False) for loss, formula in CASES]
    + [
        (loss, formula, True) for loss, formula in CASES if loss.needs_teacher and loss.refuses_sparse is None
    ],
)
def test_in_chunks_blocks_and_slices_it_is_the_plain_computation(
    loss: DistillationLoss, formula: Formula, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """144 predictions: chunks of 64, 64 and 16, their losses 10 rows at a time, of a head in blocks of 16 of its 50
    rows. Sparse targets that name every word are the teacher's whole distribution."""
    monkeypatch.setattr(fused_head, "_CHUNK", {"cpu": 1})
    monkeypatch.setattr(vocabulary, "_ROW_ELEMENTS", {"cpu": 500})
    monkeypatch.setattr(vocabulary, "_HEAD_ELEMENTS", {"cpu": 16 * 8})
    torch.manual_seed(2)
    hidden, head = torch.randn(9, 17, 8), torch.randn(50, 8)
    theirs, their_head, ids = torch.randn(9, 17, 12), torch.randn(50, 12), torch.randint(0, 50, (9, 17))
    exact = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    student, teacher = exact[0] @ exact[1].T, theirs.double() @ their_head.double().T
    expected = formula(
        student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    ).sum()
    expected.backward()
    own = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    given = {"teacher_hidden": theirs, "teacher_head": their_head}
    if sparse:
        likely, at = teacher[:, :-1].softmax(-1).float().topk(50, -1)
        given = {"sparse": SparseTargets(ids=at, probabilities=likely, tail=torch.zeros(9, 16))}
    found = fused_head_loss(*own, ids, loss=loss, dtype=torch.float32, **given)
    found.backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for mine, plain in zip(own, exact, strict=True):
        scale = plain.grad.abs().max().item()
        torch.testing.assert_close(mine.grad.double(), plain.grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(("loss", "formula"), CASES, ids=NAMES)
def test_extreme_logits_stay_finite(loss: DistillationLoss, formula: Formula) -> None:
    """Probabilities that are 0 in float32, and logits that are all equal."""
    student, teacher, labels = example(torch.float32, scale=5e3)
    student[0], teacher[1] = 0.0, 0.0
    student[2], teacher[2] = 0.0, 0.0
    value, gradient = loss.value_and_gradient(student.clone(), teacher.clone(), labels)
    assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(("loss", "formula"), CASES, ids=NAMES)
def test_a_perfect_student_has_nothing_to_learn_from_its_teacher(
    loss: DistillationLoss, formula: Formula
) -> None:
    if loss.kind in ("cross_entropy", "mixture"):
        pytest.skip("learns from the labels as well")
    student, _, labels = example()
    value, gradient = loss.value_and_gradient(student.clone(), student.clone(), labels)
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_jsd_lies_between_the_two_divergences() -> None:
    student, teacher, labels = example()

    def value(loss: DistillationLoss) -> Tensor:
        return loss.value_and_gradient(student.clone(), teacher.clone(), labels)[0]

    torch.testing.assert_close(value(JSD(beta=1e-7)) / 1e-7, value(ForwardKL()), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value(JSD(beta=1 - 1e-7)) / 1e-7, value(ReverseKL()), rtol=1e-4, atol=1e-6)
    assert value(JSD()).max() <= math.log(2)


def test_opposite_certainty_is_the_largest_distance() -> None:
    student, teacher = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([[0.0, 1e4, 0.0]])
    label = torch.tensor([0])
    for loss, expected in ((JSD(), math.log(2)), (MSE(), 2.0), (Cosine(), 1.0)):
        value, _ = loss.value_and_gradient(student.clone(), teacher.clone(), label)
        assert value.item() == pytest.approx(expected)


def test_a_mixture_needs_a_teacher_where_one_of_its_terms_does() -> None:
    labels_only = Mixture(terms=(Term(loss=CrossEntropy()),))
    assert not labels_only.needs_teacher
    assert Mixture().needs_teacher and [term.loss.kind for term in Mixture().terms] == [
        "cross_entropy",
        "forward_kl",
    ]
    student, _, labels = example()
    expected = CrossEntropy().value_and_gradient(student.clone(), None, labels)
    torch.testing.assert_close(labels_only.value_and_gradient(student, None, labels), expected)


def test_a_mixture_through_the_fused_head_is_the_sum_of_its_terms() -> None:
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, 9, 8), torch.randn(2, 9, 12)
    head, teacher_head, ids = torch.randn(50, 8), torch.randn(50, 12), torch.randint(0, 50, (2, 9))

    def total(loss: DistillationLoss) -> Tensor:
        return fused_head_loss(hidden, head, ids, loss, torch.float32, teacher_hidden, teacher_head)

    mixture = Mixture(terms=(Term(weight=0.5, loss=CrossEntropy()), Term(loss=JSD())))
    torch.testing.assert_close(total(mixture), 0.5 * total(CrossEntropy()) + total(JSD()))


@pytest.mark.parametrize("loss", [ReverseKL(), JSD(), MSE(), Cosine(), Mixture()], ids=lambda loss: loss.kind)
def test_a_loss_without_its_teacher_is_refused(loss: DistillationLoss) -> None:
    student, _, labels = example()
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        loss.value_and_gradient(student, None, labels)


@pytest.mark.parametrize("loss", [MSE, Cosine])
def test_a_temperature_on_logits_is_refused(loss: type[DistillationLoss]) -> None:
    with pytest.raises(ValidationError, match="leave temperature out"):
        loss(on="logits", temperature=2.0)


class Page(Section):
    """A file with nothing but a loss."""

    loss: Loss


def test_a_mixture_is_read_from_yaml_and_holds_no_mixture(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "loss:\n  kind: mixture\n  terms:\n"
        "    - {weight: 0.5, loss: {kind: jsd, beta: 0.2}}\n    - {loss: {kind: cross_entropy}}\n"
    )
    loss = load(file, Page)[0].loss
    assert isinstance(loss, Mixture)
    assert loss.terms == (Term(weight=0.5, loss=JSD(beta=0.2)), Term(loss=CrossEntropy()))

    file.write_text("loss: {kind: mixture, terms: [{loss: {kind: mixture}}]}\n")
    with pytest.raises(
        ConfigError, match=r"x\.yaml:1:45: loss\.terms\[0\]\.loss\.kind: unknown kind 'mixture'"
    ):
        load(file, Page)
    file.write_text("loss: {kind: mixture, terms: []}\n")
    with pytest.raises(ConfigError, match="at least 1 item"):
        load(file, Page)
    file.write_text("loss: {kind: mixture, terms: [{weight: 0, loss: {kind: jsd}}]}\n")
    with pytest.raises(ConfigError, match="must be above 0, found 0"):
        load(file, Page)
