"""What a worker raised, as the user is told of it."""

from __future__ import annotations

import errno

import pytest
import torch

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.execution.train_group import _told


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


def test_a_fault_of_the_program_stays_what_it_is() -> None:
    fault = RuntimeError("sizes 3 and 4 do not match")
    assert _told(fault) is fault
