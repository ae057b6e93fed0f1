"""What a worker raised, as the user is told of it."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
import torch

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.execution.train_group import _lost, _told


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."), "lower micro_batch"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/final.partial"), "No space left on device"),
    ],
)
def test_the_machines_faults_are_one_line(raised: Exception, said: str) -> None:
    told = _told(raised)
    assert isinstance(told, EnvironmentFailure) and said in told.message and "\n" not in told.message


def _on_the_cpu() -> object:
    return torch.empty(2**50)


def _in_numpy() -> object:
    return np.empty(2**50)


def _in_python() -> object:
    return bytearray(2**60)


def _on_a_gpu() -> object:
    return torch.empty(2**42, device="cuda")


@pytest.mark.parametrize(
    "allocate", [_on_the_cpu, _in_numpy, _in_python, pytest.param(_on_a_gpu, marks=pytest.mark.gpu)]
)
def test_memory_that_cannot_be_had_is_told_and_not_asked_for_again(allocate: Callable[[], object]) -> None:
    """More than any machine has, of whoever gives it out."""
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    told = _told(caught.value)
    assert isinstance(told, EnvironmentFailure) and "lower micro_batch" in told.message
    assert "\n" not in told.message and "enforce fail" not in told.message
    assert not _lost(caught.value, workers=2)


def test_a_fault_of_the_program_stays_what_it_is() -> None:
    fault = RuntimeError("sizes 3 and 4 do not match")
    assert _told(fault) is fault
