"""`sound_digest`: a checkpoint's digest, and whether all of its weights are numbers, in one reading.

NaN spreads through every layer behind it: found later, it looks like a learning rate that is too high. Every
byte is read for the digest anyway, and is in the processor's cache then.
"""

from __future__ import annotations

import hashlib
from io import FileIO
from pathlib import Path
from typing import Final

import numpy as np
import torch

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import Checkpoint, torch_dtype
from minitron_ray.weights.rows import spans
from minitron_ray.weights.slicing import all_finite

_BLOCK: Final = 2**20
"""Bytes that are hashed and looked at together: few enough to stay in a core's own cache, and a multiple of
every type's size."""


def sound_digest(checkpoint: Checkpoint) -> str:
    """The same as `checkpoint.digest()`, of one that has been checked.

    Raises ConfigError, naming file and tensor, where a weight is NaN or infinite; of tensors that the family
    ignores, as masks, infinity may be the meaning.
    """
    ignored = family_of(checkpoint.config).ignored_tensors
    looked_at: dict[str, dict[str, str]] = {file: {} for file in checkpoint.files}
    for name in checkpoint.names():
        if not name.endswith(ignored):
            file, stored = checkpoint.stored_as(name)
            looked_at[file][stored] = name
    return checkpoint.digest(lambda path: _sha256(path, checkpoint, looked_at[path.name]))


def _sha256(path: Path, checkpoint: Checkpoint, looked_at: dict[str, str]) -> str:
    """Of a file's bytes, in their order. `looked_at` are tensors by their name in the file."""
    found, buffer, at = hashlib.sha256(), bytearray(_BLOCK), 0
    places = sorted((place, stored) for stored, place in spans(path).items() if stored in looked_at)
    with path.open("rb", buffering=0) as file:

        def pieces(until: int) -> list[int]:
            return [min(_BLOCK, until - start) for start in range(at, until, _BLOCK)]

        for place, stored in places:
            for size in pieces(place.start):
                found.update(_read(file, buffer, size))
            at = place.start
            kind = torch_dtype(checkpoint.dtype(looked_at[stored]))
            for size in pieces(place.start + place.size):
                found.update(_read(file, buffer, size))
                values = torch.frombuffer(buffer, dtype=kind, count=size // kind.itemsize)
                if not all_finite(values):
                    first = (at - place.start) // kind.itemsize
                    shape = checkpoint.shape(looked_at[stored])
                    raise ConfigError(f"{path}: {stored} {_broken(values, first, shape)}")
                at += size
        for size in pieces(path.stat().st_size):
            found.update(_read(file, buffer, size))
    return found.hexdigest()


def _read(file: FileIO, buffer: bytearray, size: int) -> memoryview:
    """The next `size` bytes. Raises ConfigError where the file ends before."""
    view, done = memoryview(buffer)[:size], 0
    while done < size:
        read = file.readinto(view[done:])
        if not read:
            raise ConfigError(f"{file.name} is truncated; fetch it again")
        done += read
    return view


def _broken(values: torch.Tensor, first: int, shape: tuple[int, ...]) -> str:
    """What is wrong with the values from number `first` of a tensor on, and what to do."""
    number = int(torch.argwhere(~torch.isfinite(values))[0])
    place = [int(index) for index in np.unravel_index(first + number, shape)]
    value = float(values[number])
    advice = "fetch the model again, or ask its publisher for sound weights"
    if values.dtype == torch.float16 and np.isinf(value):
        largest = torch.finfo(torch.float16).max
        advice = f"float16 holds at most {largest:.0f}: convert the original weights to bfloat16 or float32"
    return f"holds {value} at {place}; every weight must be a finite number; {advice}"
