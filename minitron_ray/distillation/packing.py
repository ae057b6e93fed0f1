"""Whole numbers in as few bytes as the largest of them needs: token ids rarely need four."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bytes_for(count: int) -> int:
    """Bytes that tell `count` numbers apart, 0 to count - 1."""
    return max(1, -(-(count - 1).bit_length() // 8))


def pack(numbers: NDArray, size: int) -> NDArray:
    """uint8 (..., size), lowest byte first, of numbers below 256^size; size is at most 8."""
    parts = np.ascontiguousarray(numbers, dtype="<i8").view(np.uint8).reshape(*numbers.shape, 8)
    return np.ascontiguousarray(parts[..., :size])


def unpack(packed: NDArray) -> NDArray:
    """The inverse of `pack`, int64 (...)."""
    numbers = np.zeros(packed.shape[:-1], dtype=np.int64)
    for place in range(packed.shape[-1]):
        numbers |= packed[..., place].astype(np.int64) << (8 * place)
    return numbers
