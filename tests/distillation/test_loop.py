"""The loop: what decides its numbers, and what must not."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_ray.core.errors import MinitronError
from minitron_ray.data.batches import batch_indices
from minitron_ray.distillation.loop import Data, Recipe, Share, Step, make_optimizer, train
from minitron_ray.distillation.loss import DistillationLoss
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.teacher import (
    OnlineTeacher,
    SignalBlock,
    StoredTeacher,
    compute_block,
    write_signal,
)
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build

LENGTH, BATCH, STEPS = 16, 6, 8
TOKENS = np.random.default_rng(0).integers(0, 256, (60, LENGTH))
CPU = torch.device("cpu")


def recipe(loss: DistillationLoss | None = None, peak: float = 1e-2) -> Recipe:
    return Recipe(
        loss=loss or ForwardKL(),
        schedule=Schedule(peak=peak, minimum=0.0, warmup=0.1, tokens=STEPS * BATCH * LENGTH),
        batch=BATCH,
        sequence_length=LENGTH,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
    )


DATA = Data(batch=lambda step: batch_indices(range(60), step - 1, BATCH, 0), sequences=lambda i: TOKENS[i])

SAME = Data(batch=lambda step: np.arange(BATCH), sequences=lambda i: TOKENS[i])
"""One batch again and again, so that losses can be compared."""


def share(micro_batch: int = 4) -> Share:
    return Share(device=CPU, dtype=torch.float32, micro_batch=micro_batch)


def model(folder: Path, seed: int | None = None) -> Headless:
    checkpoint = Checkpoint(folder)
    built = build(checkpoint.config, checkpoint, dtype=torch.float32, device=CPU, trainable=True)
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return Headless(built)


def run(folder: Path, **options: int) -> tuple[list[Step], Headless]:
    student = model(folder, seed=1)
    optimizer = make_optimizer(student, recipe())
    teacher = OnlineTeacher(model(folder))
    steps = list(train(student, optimizer, teacher, DATA, recipe(), share(**options)))
    return steps, student


def test_a_damaged_copy_of_the_teacher_gets_closer_to_it(tiny_llama: Path) -> None:
    student, teacher = model(tiny_llama, seed=1), OnlineTeacher(model(tiny_llama))
    steps = list(train(student, make_optimizer(student, recipe()), teacher, SAME, recipe(), share()))
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    assert [step.tokens for step in steps] == [BATCH * LENGTH * i for i in range(1, STEPS + 1)]
    assert steps[-1].loss < 0.7 * steps[0].loss


def test_the_numbers_do_not_depend_on_the_micro_batch(tiny_llama: Path) -> None:
    whole, _ = run(tiny_llama, micro_batch=6)
    split, _ = run(tiny_llama, micro_batch=1)
    np.testing.assert_allclose([s.loss for s in whole], [s.loss for s in split], rtol=1e-4)


def test_going_on_from_a_step_repeats_the_rest_bit_for_bit(tiny_llama: Path) -> None:
    whole, finished = run(tiny_llama)
    student, teacher = model(tiny_llama, seed=1), OnlineTeacher(model(tiny_llama))
    optimizer = make_optimizer(student, recipe())
    for step in train(student, optimizer, teacher, DATA, recipe(), share()):
        if step.step == 3:
            break
    again = model(tiny_llama)
    again.load_state_dict(student.state_dict())
    resumed = make_optimizer(again, recipe())
    resumed.load_state_dict(optimizer.state_dict())
    rest = list(train(again, resumed, teacher, DATA, recipe(), share(), first_step=4))
    assert [s.loss for s in rest] == [s.loss for s in whole[3:]]
    for name, value in finished.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def stored_teacher(
    teacher: Headless, sequences: list[int], folder: Path, dtype: torch.dtype
) -> StoredTeacher:
    seen: list[int] = []
    block = SignalBlock(folder=folder, signal=FinalHidden(), sequences=sequences)
    compute_block(
        block, folder, teacher, TOKENS.__getitem__, dtype=dtype, batch=7, seed=0, progress=seen.append
    )
    write_signal(folder, [block])
    assert seen[-1] == len(sequences)
    return StoredTeacher(folder, teacher.head.detach())


def test_the_stored_teacher_trains_like_the_online_one(tiny_llama: Path, tmp_path: Path) -> None:
    online, _ = run(tiny_llama)
    teacher = model(tiny_llama)
    stored = stored_teacher(teacher, list(range(60)), tmp_path, torch.float32)
    student = model(tiny_llama, seed=1)
    steps = list(train(student, make_optimizer(student, recipe()), stored, DATA, recipe(), share()))
    np.testing.assert_allclose([s.loss for s in steps], [s.loss for s in online], rtol=1e-5)


def test_bfloat16_states_come_back_as_they_were(tiny_llama: Path, tmp_path: Path) -> None:
    teacher = model(tiny_llama)
    stored = stored_teacher(teacher, [5, 2, 9], tmp_path, torch.bfloat16)
    ids = torch.from_numpy(TOKENS[[9, 5]])
    expected = OnlineTeacher(teacher).hidden([9, 5], ids).to(torch.bfloat16)
    assert torch.equal(stored.hidden([9, 5], ids), expected)


def test_cross_entropy_needs_no_teacher(tiny_llama: Path) -> None:
    student = model(tiny_llama)
    chosen = recipe(CrossEntropy())
    steps = list(train(student, make_optimizer(student, chosen), None, SAME, chosen, share()))
    assert steps[-1].loss < 0.9 * steps[0].loss


def damaged_teacher(folder: Path, out: Path, steps: list[int]) -> StoredTeacher:
    """Whose stored hidden states of the first sequence of some steps are not numbers."""
    out.mkdir()
    stored = stored_teacher(model(folder), list(range(60)), out, torch.float32)
    hidden = np.memmap(out / "hidden.bin", dtype="<f4", mode="r+").reshape(60, -1)
    hidden[[DATA.batch(step)[0] for step in steps]] = np.nan
    hidden.flush()
    return stored


def weights(student: Headless) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(tiny_llama: Path, tmp_path: Path) -> None:
    teacher = damaged_teacher(tiny_llama, tmp_path / "damaged", [3, 4])
    student = model(tiny_llama, seed=1)
    after, found = {0: weights(student)}, []
    for step in train(student, make_optimizer(student, recipe()), teacher, DATA, recipe(), share()):
        found.append(step)
        after[step.step] = weights(student)
    assert [step.skipped for step in found] == [0, 0, 1, 2, 0, 0, 0, 0]
    assert [math.isfinite(step.loss) for step in found] == [not step.skipped for step in found]
    assert [step.tokens for step in found] == [BATCH * LENGTH * i for i in range(1, STEPS + 1)]
    changed = [
        any(not torch.equal(v, after[i - 1][n]) for n, v in after[i].items()) for i in range(1, STEPS + 1)
    ]
    assert changed == [not step.skipped for step in found]

    # The oracle goes from step 2 to step 5 without having seen what is between them.
    again, (whole, rest) = model(tiny_llama, seed=1), (OnlineTeacher(model(tiny_llama)), list[Step]())
    optimizer = make_optimizer(again, recipe())
    for first, last in ((1, 2), (5, STEPS)):
        for step in train(again, optimizer, whole, DATA, recipe(), share(), first_step=first):
            rest.append(step)
            if step.step == last:
                break
    made = [step.loss for step in found if not step.skipped]
    np.testing.assert_allclose([step.loss for step in rest], made, rtol=1e-5)


def test_three_steps_in_a_row_that_are_not_finite_end_it_and_name_the_batch(
    tiny_llama: Path, tmp_path: Path
) -> None:
    teacher = damaged_teacher(tiny_llama, tmp_path / "damaged", [2, 3, 4, 7])
    student, found = model(tiny_llama, seed=1), list[Step]()
    batch = DATA.batch(4)
    digest = hashlib.sha256(TOKENS[batch].astype("<i8").tobytes()).hexdigest()[:16]
    names = ", ".join(str(number) for number in batch)
    rule = f"at step 4 are not finite, as in the 2 steps before it.*sequences {names} .*{digest}.*0.01"
    with pytest.raises(MinitronError, match=rule):
        for step in train(student, make_optimizer(student, recipe()), teacher, DATA, recipe(), share()):
            found.append(step)
    assert [step.skipped for step in found] == [0, 1, 2, 3]
    goes_on = partial(train, student, make_optimizer(student, recipe()), teacher, DATA, recipe(), share())
    with pytest.raises(MinitronError, match="at step 4 are not finite"):
        list(goes_on(first_step=4, skipped=2))  # of which two came before an interruption
    assert [step.skipped for step in goes_on(first_step=6, skipped=2)] == [0, 1, 0]


def test_the_wish_to_stop_comes_back_with_the_step(tiny_llama: Path) -> None:
    student = model(tiny_llama)
    chosen = recipe(CrossEntropy())
    asked = iter([False, True])
    steps = train(
        student,
        make_optimizer(student, chosen),
        None,
        DATA,
        chosen,
        share(),
        stop_requested=lambda: next(asked),
    )
    assert [next(steps).stop_requested, next(steps).stop_requested] == [False, True]


def test_the_rate_rises_and_falls_by_tokens() -> None:
    schedule = Schedule(peak=2.0, minimum=0.5, warmup=0.1, tokens=1000)
    assert schedule.rate(50) == pytest.approx(1.0)
    assert schedule.rate(100) == pytest.approx(2.0)
    assert schedule.rate(550) == pytest.approx(1.25)
    assert schedule.rate(1000) == pytest.approx(0.5)
