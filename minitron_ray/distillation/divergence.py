"""When a student that is being distilled gets further from its teacher instead of closer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from minitron_ray.core.units import format_count

RISE: Final = 0.05
"""Share by which the divergence must be above its least so far to count as risen. It is measured on the
same sequences every time, so that only training moves it."""


def rise(measured: Sequence[tuple[int, float]]) -> str | None:
    """The first rise in `measured`, pairs of tokens seen and KL(teacher || student), in order of tokens:
    one line for people. None where there is none."""
    least: tuple[int, float] | None = None
    for tokens, divergence in measured:
        if least is not None and divergence > least[1] * (1 + RISE):
            return (
                f"divergence from the teacher rose from {least[1]:.4f} after {format_count(least[0])} tokens "
                f"to {divergence:.4f} after {format_count(tokens)}; lower learning_rate if it does not come "
                f"back"
            )
        if least is None or divergence < least[1]:
            least = tokens, divergence
    return None
