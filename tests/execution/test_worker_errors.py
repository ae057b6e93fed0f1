"""What a worker raised, as the user is told of it."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import ray
import torch
from ray.train.v2.api.exceptions import WorkerGroupError

from minitron_ray.core.errors import EnvironmentFailure, MinitronError
from minitron_ray.execution.failures import first_line, left_off, of_the_machine, told
from minitron_ray.execution.train_group import _lost


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."), "lower micro_batch"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/final.partial"), "No space left on device"),
        (
            torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nMore."),
            "uncorrectable ECC",
        ),
        (torch.AcceleratorError("CUDA error: out of memory\nMore."), "lower micro_batch"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `f`"), "lower micro_batch"),
        (torch.distributed.DistBackendError("NCCL error: unhandled system error"), "unhandled system error"),
        (
            torch.distributed.DistBackendError("NCCL error:\nCuda failure 2 'out of memory'"),
            "lower micro_batch",
        ),
    ],
)
def test_the_machines_faults_are_one_line(raised: Exception, said: str) -> None:
    """And say nothing of a student."""
    found = told(raised)
    assert isinstance(found, EnvironmentFailure) and said in found.message and "\n" not in found.message
    assert of_the_machine(raised)


def test_a_lost_connection_is_told_without_what_gloo_wraps_around_it() -> None:
    """The message of torch 2.13, as it is."""
    error = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1463. This "
        "is typically caused by a remote worker crashing. Check the logs of the remote worker before reporting an "
        "error. GLHF! 🏖️"
    )
    assert first_line(error) == "Connection closed by peer [127.0.0.1]:1463"


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
    found = told(caught.value)
    assert isinstance(found, EnvironmentFailure) and "lower micro_batch" in found.message
    assert "\n" not in found.message and "enforce fail" not in found.message
    assert not _lost(caught.value, workers=2)


def test_what_was_not_training_has_other_settings_to_lower() -> None:
    found = told(torch.OutOfMemoryError("CUDA out of memory."), training=False)
    assert isinstance(found, EnvironmentFailure) and "activation_checkpointing" not in found.message
    assert "; lower micro_batch, set importance: streamed" in found.message


@pytest.mark.parametrize(
    ("raised", "so"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (EnvironmentFailure("1L at micro_batch 2 needs more memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (ray.exceptions.WorkerCrashedError(), True),
        (MinitronError("loss nan at step 3 is not finite"), False),
        (RuntimeError("sizes 3 and 4 do not match"), False),
        (torch.AcceleratorError("CUDA error: invalid configuration argument"), False),
    ],
)
def test_whose_fault_it_is(raised: Exception, so: bool) -> None:
    assert of_the_machine(raised) == so


_LOST = """
import torch
from minitron_ray.execution.failures import of_the_machine

def raised():
    try:
        torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].sum().item()
    except RuntimeError as error:
        return error

assert not of_the_machine(RuntimeError("sizes 3 and 4 do not match"))
torch.zeros(1, device="cuda")
assert not of_the_machine(RuntimeError("sizes 3 and 4 do not match"))
assert of_the_machine(raised()) and of_the_machine(raised())
"""


@pytest.mark.gpu
def test_what_takes_the_gpu_with_it_says_nothing_of_those_who_come_after() -> None:
    """In a process of its own, since nothing works in it any more."""
    done = subprocess.run([sys.executable, "-c", _LOST], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_what_all_ranks_say_of_a_connection_is_no_fault_of_the_program() -> None:
    """NCCL words a lost worker alike on all that are left."""
    failed = {
        rank: torch.distributed.DistBackendError("NCCL error: remote process exited") for rank in (0, 1)
    }
    assert _lost(WorkerGroupError("", failed), workers=2)
    alike = {rank: RuntimeError("sizes 3 and 4 do not match") for rank in (0, 1)}
    assert not _lost(WorkerGroupError("", alike), workers=2)


def test_what_to_do_is_said_once() -> None:
    assert left_off("1L", "disk full").message == (
        "1L: disk full; mend that, then run the same command again: it goes on from what is saved"
    )
    whole = "1L needs memory; lower it, then run the same command again"
    assert left_off("1L", whole).message == whole


def test_a_fault_of_the_program_stays_what_it_is() -> None:
    fault = RuntimeError("sizes 3 and 4 do not match")
    assert told(fault) is fault
