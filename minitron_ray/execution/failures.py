"""Failures of the machine, told from those of the work that it does.

What the machine is at fault for (memory, a disk, a process or node that was lost) says nothing about the
work: when that is mended, the same work is done again, from what is saved of it.
"""

from __future__ import annotations

import re
from typing import Final

import ray
import torch
from torch.distributed import DistError

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.weights.device import device_is_lost, memory_shortage

_GLOO: Final = re.compile(r"^\[\S+:\d+\] |\. This is typically caused by a remote worker crashing\b.*$")
_AGAIN: Final = "run the same command again"
_HARDWARE: Final = re.compile(
    r"\b(?:ECC|NVLink|hardware)\b|unspecified launch failure|launch timed out|busy or unavailable"
)
"""What a device says of itself, and not of what it was asked."""


def of_the_machine(error: BaseException) -> bool:
    """Whether the machine is at fault for what was raised, out of Ray's wrappings; or it was at first something else
    that took this process's device with it, so that all that follows would fail here, too."""
    if isinstance(error, EnvironmentFailure | OSError | ray.exceptions.RayError):
        return not isinstance(error, ray.exceptions.RayTaskError)
    return memory_shortage(error) is not None or _of_a_device(error) or device_is_lost()


def _of_a_device(error: BaseException) -> bool:
    """A device that failed, or a connection between two."""
    if isinstance(error, torch.AcceleratorError):
        return _HARDWARE.search(str(error)) is not None
    return isinstance(error, DistError)


def told(error: BaseException, *, training: bool = True) -> BaseException:
    """What a worker raised, for people where it is the machine's fault and not the program's. Other settings
    help where it was not `training`, but ran a model forward."""
    if (shortage := memory_shortage(error)) is not None:
        more = "set activation_checkpointing: true or give more workers"
        if not training:
            more = "set importance: streamed for scores, or have fewer workers where they share memory,"
        return EnvironmentFailure(
            f"a worker's device has too little memory: {shortage}; lower micro_batch, {more} in the cluster file, then "
            "run it again"
        )
    if isinstance(error, OSError) or _of_a_device(error):
        return EnvironmentFailure(
            f"a worker can't go on: {first_line(error)}; mend that, then run it again: it goes on from what is saved"
        )
    return error


def left_off(name: str, reason: str) -> EnvironmentFailure:
    """Says that the work on `name` could not go on for `reason`, and what to do."""
    said = reason if reason.startswith(name) else f"{name}: {reason}"
    if _AGAIN not in said:
        said += f"; mend that, then {_AGAIN}: it goes on from what is saved"
    return EnvironmentFailure(said)


def first_line(error: BaseException) -> str:
    """Of a message, the first that says something; without the place in PyTorch's source, and the advice, that
    gloo wraps around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _GLOO.sub("", lines[0]) if lines else type(error).__name__
