"""What is stored of the teacher: exact, bounded or unbiased, each against the teacher's own logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_ray.core.errors import MinitronError
from minitron_ray.distillation.fused_head import fused_head_loss
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.losses.jsd import JSD
from minitron_ray.distillation.losses.mixture import Mixture, Term
from minitron_ray.distillation.packing import bytes_for, pack, unpack
from minitron_ray.distillation.signal import StoredSignal
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.signals.sampled import Sampled
from minitron_ray.distillation.signals.top_k import TopK
from minitron_ray.distillation.targets import SparseTargets
from minitron_ray.distillation.teacher import (
    OnlineTeacher,
    SignalBlock,
    StoredTeacher,
    TeacherSignal,
    compute_block,
    write_signal,
)
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build

LENGTH = 12
TOKENS = np.random.default_rng(0).integers(0, 256, (20, LENGTH))
NUMBERS = [4, 11, 7]
IDS = torch.from_numpy(TOKENS[NUMBERS])
CPU = torch.device("cpu")


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Headless:
    checkpoint = Checkpoint(folder)
    return Headless(build(checkpoint.config, checkpoint, dtype=dtype).eval())


def stored(
    teacher: Headless,
    signal: StoredSignal,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> StoredTeacher:
    """Two blocks of twenty sequences, in batches that do not divide them."""
    blocks = [
        SignalBlock(folder=folder / name, signal=signal, sequences=part)
        for name, part in (("a", range(11)), ("b", range(11, 20)))
    ]
    for block in blocks:
        block.folder.mkdir(parents=True)
        compute_block(block, block.folder, teacher, TOKENS.__getitem__, dtype=dtype, batch=4, seed=seed)
    write_signal(folder, blocks)
    return StoredTeacher(folder, teacher.head.detach())


def gradients(
    signal: TeacherSignal, loss: DistillationLoss, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, and gradients by a student's final hidden states and head, through the fused head."""
    source = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, LENGTH, 16, generator=source).requires_grad_()
    head = torch.randn(256, 16, generator=source).mul_(0.3).requires_grad_()
    found = signal.targets(NUMBERS, IDS)
    sparse = isinstance(found, SparseTargets)
    value = fused_head_loss(
        hidden,
        head,
        IDS,
        loss,
        dtype,
        teacher_hidden=None if sparse else found,
        teacher_head=None if sparse else signal.head,
        sparse=found if sparse else None,
    )
    value.backward()
    assert hidden.grad is not None and head.grad is not None
    return value.detach(), hidden.grad, head.grad


@pytest.fixture(scope="module")
def teacher(tiny_llama: Path) -> Headless:
    return opened(tiny_llama)


def logits(teacher: Headless) -> Tensor:
    """The stock model's own, of all tokens that predict."""
    with torch.no_grad():
        return teacher.model(IDS).logits[:, :-1].float()


# --- final_hidden ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", [ForwardKL(), JSD(), Mixture()], ids=lambda loss: loss.kind)
def test_gradients_from_final_hidden_are_those_of_the_running_teacher(
    loss: DistillationLoss, dtype: torch.dtype, tiny_llama: Path, tmp_path: Path
) -> None:
    """In bfloat16 too: what is stored are the very bits. They differ only by the batch that the teacher saw."""
    model = opened(tiny_llama, dtype)
    online = gradients(OnlineTeacher(model), loss, dtype)
    cached = gradients(stored(model, FinalHidden(), tmp_path, dtype=dtype), loss, dtype)
    for ours, expected in zip(cached, online, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            ours, expected, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 8e-3)
        )


def test_int8_is_off_by_at_most_half_a_step(teacher: Headless, tmp_path: Path) -> None:
    exact = OnlineTeacher(teacher).hidden(NUMBERS, IDS)
    found = stored(teacher, FinalHidden(dtype="int8"), tmp_path).targets(NUMBERS, IDS)
    assert isinstance(found, Tensor) and found.dtype == torch.float32
    step = exact.abs().amax(-1, keepdim=True) / 127
    assert ((found - exact).abs() <= step * 0.5001).all()
    assert (found - exact).abs().max() > 0


def test_int8_changes_gradients_by_little(teacher: Headless, tmp_path: Path) -> None:
    exact = gradients(OnlineTeacher(teacher), ForwardKL())[1].flatten()
    rounded = gradients(stored(teacher, FinalHidden(dtype="int8"), tmp_path), ForwardKL())[1].flatten()
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.9997


def test_int8_of_nothing_but_zeros_is_zeros() -> None:
    signal = FinalHidden(dtype="int8")
    arrays = signal.encode(torch.zeros(1, 3, 4), torch.randn(5, 4), None, [0], 0)
    assert torch.equal(signal.decode([signal.row(arrays, 0)], CPU), torch.zeros(1, 3, 4))


# --- sampled --------------------------------------------------------------------------------------


def dense(targets: SparseTargets, vocabulary: int = 256) -> Tensor:
    whole = torch.zeros(*targets.ids.shape[:-1], vocabulary)
    return whole.scatter_add_(-1, targets.ids, targets.probabilities)


@pytest.mark.parametrize("draws", [1, 4])
def test_the_mean_of_sampled_gradients_tends_to_the_full_one(
    draws: int, teacher: Headless, tmp_path: Path
) -> None:
    """The closed form is q - p. Over 400 seeds each entry's mean is within five standard errors of it, and
    values and gradients of the whole batch get closer as the square root of the number of seeds."""
    count = 400
    q = torch.randn(3, LENGTH - 1, 256, generator=torch.Generator().manual_seed(5)).softmax(-1)
    p = logits(teacher).softmax(-1)
    expected_value = (p * (p / q).log()).sum(-1)
    signal, loss = Sampled(draws=draws), ForwardKL()
    hidden = OnlineTeacher(teacher).hidden(NUMBERS, IDS)
    values, slopes = [], []
    for seed in range(count):
        arrays = signal.encode(hidden, teacher.head.detach(), None, NUMBERS, seed)
        targets = signal.decode([signal.row(arrays, n) for n in range(3)], CPU).flat()
        value, slope = loss.sparse_value_and_gradient(q.log().flatten(0, 1), targets, IDS[:, 1:].flatten())
        values.append(value.view(3, -1))
        slopes.append(slope.view(q.shape))
    found = torch.stack(slopes)
    deviation = found.mean(0) - (q - p)
    error = (p * (1 - p) / (draws * count)).sqrt()  # of independent draws; strata have no more
    assert (deviation.abs() <= 5 * error + 3.0 / (draws * count)).all()
    assert deviation.norm() < 1.1 * error.norm()
    single = (found[0] - (q - p)).norm()
    assert deviation.norm() < 2 * single / count**0.5
    told = torch.stack(values)
    spread = told.std(0) / count**0.5
    assert ((told.mean(0) - expected_value).abs() < 5 * spread + 2e-3).all()  # the entropy has 11 bits


def test_strata_have_less_variance_than_independent_draws(teacher: Headless) -> None:
    """Of a teacher that is about as sure as a trained one."""
    head = teacher.head.detach() * 6
    signal, p = Sampled(draws=8), (logits(teacher) * 6).softmax(-1)
    hidden, squares = OnlineTeacher(teacher).hidden(NUMBERS, IDS), []
    for seed in range(100):
        arrays = signal.encode(hidden, head, None, NUMBERS, seed)
        targets = signal.decode([signal.row(arrays, n) for n in range(3)], CPU)
        squares.append((dense(targets) - p).square().sum(-1))
    independent = (p * (1 - p)).sum(-1) / 8
    assert torch.stack(squares).mean() < 0.8 * independent.mean()


def test_draws_depend_on_seed_and_sequence_alone(teacher: Headless, tmp_path: Path) -> None:
    def targets(name: str, seed: int, numbers: list[int] = NUMBERS) -> SparseTargets:
        source = stored(teacher, Sampled(draws=5), tmp_path / name, seed=seed)
        found = source.targets(numbers, torch.from_numpy(TOKENS[numbers]))
        assert isinstance(found, SparseTargets)
        return found

    first = targets("first", 1)
    assert torch.equal(dense(first), dense(targets("again", 1)))
    assert not torch.equal(dense(first), dense(targets("other", 2)))
    assert torch.equal(dense(first)[1:], dense(targets("fewer", 1, NUMBERS[1:])))
    torch.testing.assert_close(dense(first).sum(-1), torch.ones(3, LENGTH - 1))


def test_sampled_takes_as_many_bytes_as_it_says(tmp_path: Path) -> None:
    """At a peaked distribution over a vocabulary of a real model's size."""
    torch.manual_seed(0)
    signal, head, hidden = Sampled(), torch.randn(49_152, 8), torch.randn(2, 65, 8)
    arrays = signal.encode(hidden, head, None, [0, 1], 0)
    entries, tokens = len(arrays["entries"]), 2 * 64
    assert arrays["entries"].shape == (arrays["unique"].sum(), 3)  # 49,152 x 50 numbers need three bytes
    size = sum(array.nbytes for name, array in arrays.items() if name != "lengths")
    assert size == 3 * entries + (1 + 2) * tokens
    assert signal.bytes_a_token(576, 49_152, 2) == pytest.approx(48)


# --- top_k ----------------------------------------------------------------------------------------


def partition(p: Tensor, leaf: Tensor, k: int) -> Tensor:
    """KL over the k likeliest of p and "any other", by the textbook."""
    at = p.topk(k, -1).indices
    others = torch.ones_like(p).scatter_(-1, at, 0.0)
    q = leaf.softmax(-1)
    groups = [torch.cat([x.gather(-1, at), (x * others).sum(-1, keepdim=True)], -1) for x in (p, q)]
    return (groups[0].xlogy(groups[0] / groups[1])).sum(-1)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_top_k_is_the_divergence_over_its_ids_and_any_other(k: int) -> None:
    torch.manual_seed(2)
    p, student = torch.randn(6, 50, dtype=torch.float64).mul(2).softmax(-1), torch.randn(6, 50).double()
    likely, at = p.topk(k, -1)
    tail = 1 - likely.sum(-1)
    targets = SparseTargets(ids=at, probabilities=likely, tail=tail)
    value, slope = ForwardKL().sparse_value_and_gradient(
        student.clone(), targets, torch.zeros(6, dtype=torch.long)
    )
    leaf = student.clone().requires_grad_()
    expected = partition(p, leaf, k)
    expected.sum().backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(slope, leaf.grad)


def test_top_k_of_the_whole_vocabulary_is_the_full_loss(teacher: Headless, tmp_path: Path) -> None:
    """Up to the 11 bits that probabilities are stored with."""
    exact = gradients(OnlineTeacher(teacher), ForwardKL())
    found = gradients(stored(teacher, TopK(k=1000), tmp_path), ForwardKL())
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    signal = stored(teacher, TopK(k=1000), tmp_path / "again").targets(NUMBERS, IDS)
    assert isinstance(signal, SparseTargets) and signal.ids.shape[-1] == 256 and not signal.tail.any()


def test_with_the_whole_vocabulary_value_and_gradient_are_equal_to_rounding() -> None:
    torch.manual_seed(2)
    student, other = torch.randn(6, 50, dtype=torch.float64), torch.randn(6, 50, dtype=torch.float64)
    likely, at = other.softmax(-1).topk(50, -1)
    labels = torch.zeros(6, dtype=torch.long)
    targets = SparseTargets(ids=at, probabilities=likely, tail=torch.zeros(6, dtype=torch.float64))
    found = ForwardKL().sparse_value_and_gradient(student.clone(), targets, labels)
    torch.testing.assert_close(found, ForwardKL().value_and_gradient(student.clone(), other, labels))


def test_the_stored_tail_is_the_mass_of_all_others(teacher: Headless, tmp_path: Path) -> None:
    p = logits(teacher).softmax(-1)
    found = stored(teacher, TopK(k=7), tmp_path).targets(NUMBERS, IDS)
    assert isinstance(found, SparseTargets) and found.tail is not None
    torch.testing.assert_close(found.tail, 1 - p.topk(7, -1).values.sum(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.probabilities.sum(-1) + found.tail, torch.ones(3, LENGTH - 1))
    kept = p.gather(-1, found.ids)
    torch.testing.assert_close(found.probabilities, kept, rtol=2e-3, atol=1e-6)


def test_a_student_without_a_tail_has_finite_losses() -> None:
    """Its mass on all other ids is 0 in float32, the teacher's is not."""
    student = torch.zeros(1, 9)
    student[0, 2] = 5e3
    targets = SparseTargets(
        ids=torch.tensor([[2]]), probabilities=torch.tensor([[0.75]]), tail=torch.tensor([0.25])
    )
    value, slope = ForwardKL().sparse_value_and_gradient(student, targets, torch.tensor([0]))
    assert value.isfinite().all() and value > 1 and slope.isfinite().all()


# --- losses on sparse targets ---------------------------------------------------------------------


def test_a_mixture_is_the_sum_of_its_terms_on_sparse_targets(teacher: Headless, tmp_path: Path) -> None:
    source = stored(teacher, Sampled(), tmp_path)
    mixture = Mixture(terms=(Term(weight=0.5, loss=CrossEntropy()), Term(weight=2.0, loss=ForwardKL())))
    parts = [gradients(source, loss) for loss in (CrossEntropy(), ForwardKL())]
    for whole, labels, divergence in zip(gradients(source, mixture), *parts, strict=True):
        torch.testing.assert_close(whole, 0.5 * labels + 2 * divergence, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (JSD(), "jsd compares whole distributions"),
        (ForwardKL(temperature=2), "forward_kl has temperature 2"),
        (Mixture(terms=(Term(loss=JSD()),)), "mixture has a term jsd, which compares whole distributions"),
    ],
    ids=lambda item: getattr(item, "kind", ""),
)
def test_a_loss_that_needs_all_logits_refuses_sparse_targets(
    loss: DistillationLoss, reason: str, teacher: Headless, tmp_path: Path
) -> None:
    assert f"{loss.kind} {loss.refuses_sparse}" == reason
    source = stored(teacher, Sampled(draws=2), tmp_path)
    if isinstance(loss, Mixture):
        reason = "jsd compares"  # said by the term that is asked first
    with pytest.raises(ValueError, match=reason):
        gradients(source, loss)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 255, 256, 257, 65_536, 65_537, 2**24, 2**24 + 1])
def test_numbers_come_back_out_of_as_few_bytes_as_hold_them(count: int) -> None:
    numbers = np.unique(np.asarray([0, 1, count // 2, count - 1]))[None]
    size = bytes_for(count)
    assert 256 ** (size - 1) < count <= 256**size or size == 1
    packed = pack(numbers, size)
    assert packed.dtype == np.uint8 and packed.shape == (*numbers.shape, size)
    np.testing.assert_array_equal(unpack(packed), numbers)


def test_losses_are_not_measured_with_an_inexact_signal(teacher: Headless, tmp_path: Path) -> None:
    source = stored(teacher, Sampled(draws=2), tmp_path)
    with pytest.raises(ValueError, match="of sequence 4 is stored sampled 2, not the final hidden states"):
        source.hidden(NUMBERS, IDS)


def test_states_of_two_types_are_never_mixed(teacher: Headless, tmp_path: Path) -> None:
    """The second block holds bits of bfloat16: beside float32 they would be read as numbers up to 32,767."""
    stored(teacher, FinalHidden(), tmp_path)
    rounded = SignalBlock(folder=tmp_path / "b", signal=FinalHidden(), sequences=range(11, 20))
    compute_block(rounded, rounded.folder, teacher, TOKENS.__getitem__, dtype=torch.bfloat16, batch=4, seed=0)
    source = StoredTeacher(tmp_path, teacher.head.detach())
    exact = OnlineTeacher(teacher).hidden([4, 7], IDS[[0, 2]])
    torch.testing.assert_close(source.hidden([4, 7], IDS[[0, 2]]), exact)
    assert source.hidden([11], IDS[[1]]).dtype == torch.bfloat16
    with pytest.raises(MinitronError, match=r"several types \(float32, int16\).*set `precision: float32`"):
        source.targets(NUMBERS, IDS)


def test_a_block_that_was_removed_is_named(teacher: Headless, tmp_path: Path) -> None:
    source = stored(teacher, FinalHidden(), tmp_path)
    (tmp_path / "b" / "hidden.bin").unlink()
    with pytest.raises(MinitronError, match=r"incomplete: .*b/hidden\.bin is missing; remove the folder"):
        source.targets([15], IDS[:1])


@pytest.mark.parametrize("signal", [TopK(k=8), Sampled(draws=6)])
def test_a_signal_of_the_common_vocabulary_is_that_of_a_teacher_without_the_other_rows(
    signal: StoredSignal, tiny_llama: Path, tmp_path: Path
) -> None:
    whole, small = opened(tiny_llama), opened(tiny_llama)
    block = SignalBlock(folder=tmp_path, signal=signal, sequences=NUMBERS)
    ids = TOKENS % 200
    hidden = OnlineTeacher(small, 200).hidden(NUMBERS, torch.from_numpy(ids[NUMBERS]))
    expected = signal.encode(hidden, small.head.detach()[:200].clone(), small.softcap, NUMBERS, 0)
    (tmp_path / "block").mkdir()
    compute_block(
        block,
        tmp_path / "block",
        whole,
        ids.__getitem__,
        dtype=torch.float32,
        batch=4,
        seed=0,
        vocabulary=200,
    )
    listed = SignalBlock(folder=tmp_path / "block", signal=signal, sequences=NUMBERS)
    write_signal(tmp_path, [listed])
    kept = OnlineTeacher(whole, 200)
    assert kept.head.shape == (200, 48)
    found = StoredTeacher(tmp_path, kept.head).targets(NUMBERS, torch.from_numpy(ids[NUMBERS]))
    rows = [signal.row(expected, place) for place in range(len(NUMBERS))]
    wanted = signal.decode(rows, CPU)
    assert isinstance(found, SparseTargets) and isinstance(wanted, SparseTargets)
    torch.testing.assert_close(found.ids, wanted.ids)
    torch.testing.assert_close(found.probabilities, wanted.probabilities)
    assert int(found.ids.max()) < 200
