"""Which of several students is best, as far as their validation sequences can tell.

All students are measured on the same sequences, and sequences differ far more than students do. So
two are compared by the differences on each sequence (paired), and how sure their mean is comes from
drawing the sequences again with replacement (Efron & Tibshirani 1993, §12.5: the bootstrap-t, which
keeps its level at a few dozen sequences, where the percentile interval is too narrow).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL: Final = 0.95
DRAWS: Final = 10_000
_BLOCK: Final = 1 << 21
"""Counts drawn at a time: 16 MiB."""
_COLUMNS: Final = 256
"""Comparisons worked on at a time: 20 MiB for the default number of draws."""

Losses = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean difference of losses (nats per token) and its confidence interval."""

    difference: float
    low: float
    high: float

    @property
    def tied(self) -> bool:
        """Whether the sequences do not tell the two apart: the interval holds zero."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One student against the best of its group."""

    name: str
    loss: float
    behind: Interval
    """This one's loss less the best one's; of the best itself, zero."""

    @property
    def tied(self) -> bool:
        """With the best, which counts as tied with itself."""
        return self.behind.tied


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, seed: int, draws: int = DRAWS, level: float = LEVEL
) -> Interval:
    """The mean of a - b with its bootstrap-t interval; a and b are losses on the same sequences, in order.

    Fewer than four sequences tell nothing: the interval is then infinite, unless all differences are
    equal and two sequences or more. Raises ValueError for losses that are not paired or not finite.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"losses of shape {first.shape} and {second.shape} are not paired; give one loss for each sequence"
        )
    return intervals((first - second)[:, None], seed=seed, draws=draws, level=level)[0]


def intervals(differences: Losses, *, seed: int, draws: int = DRAWS, level: float = LEVEL) -> list[Interval]:
    """One interval a column of `differences` (sequences, comparisons), all from the same draws.

    Raises ValueError for a difference that is not finite, or a level outside 0..1.
    """
    if not np.isfinite(differences).all():
        raise ValueError("a loss is not finite: a student without a loss can't be compared")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; a confidence level lies between 0 and 1")
    parts = np.split(differences, range(_COLUMNS, differences.shape[1], _COLUMNS), axis=1)
    return [one for part in parts for one in _intervals(part, seed, draws, level)]


def _intervals(differences: Losses, seed: int, draws: int, level: float) -> list[Interval]:
    n = len(differences)
    means = differences.mean(axis=0)
    centred = differences - means
    errors = np.sqrt((centred**2).mean(axis=0))
    # Differences that are equal but for rounding have no spread to draw from.
    errors[errors <= 1e-12 * np.abs(differences).max(axis=0, initial=0.0)] = 0.0
    if n == 1:
        return [Interval(difference=float(mean), low=-math.inf, high=math.inf) for mean in means]
    spread = np.concatenate(list(_studentized(centred, seed, draws)))
    # An interval mirrors the distribution: what is drawn too high says the truth lies lower. The order
    # statistics next to the levels, not a mean of two, as one of them may be infinite.
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest")
    return [
        Interval(difference=float(mean), low=float(mean), high=float(mean))
        if error == 0
        else Interval(difference=float(mean), low=float(mean - error * up), high=float(mean - error * down))
        for mean, error, down, up in zip(means, errors, low, high, strict=True)
    ]


def standings(losses: Mapping[str, ArrayLike], *, seed: int, draws: int = DRAWS) -> tuple[Standing, ...]:
    """Everyone against the one of the least mean loss, best first; equal losses in the order of names.

    Each interval is of one comparison alone: among twenty students as good as the best, one in about
    twenty is expected to look worse. Raises ValueError as `paired_bootstrap`.
    """
    if not losses:
        return ()
    order = _order(losses)
    values = [np.asarray(losses[name], np.float64) for name in order]
    shapes = {value.shape for value in values}
    if len(shapes) > 1 or len(values[0].shape) != 1:
        raise ValueError(f"losses of shapes {sorted(shapes)} are not paired; give one loss for each sequence")
    behind = intervals(np.stack(values, axis=1) - values[0][:, None], seed=seed, draws=draws)
    itself = Interval(difference=0.0, low=0.0, high=0.0)
    return tuple(
        Standing(name=name, loss=float(value.mean()), behind=interval if place else itself)
        for place, (name, value, interval) in enumerate(zip(order, values, behind, strict=True))
    )


def tied_with_best(losses: Mapping[str, ArrayLike], *, seed: int, draws: int = DRAWS) -> tuple[str, ...]:
    """The best, and all whose interval to it holds zero, by loss. See `standings`."""
    return tuple(standing.name for standing in standings(losses, seed=seed, draws=draws) if standing.tied)


def keep_best(losses: Mapping[str, ArrayLike], keep: int | str, *, seed: int) -> tuple[str, ...]:
    """The names that go on, best first: the first `keep`, or for `ties` all that tie with the best.

    Raises ValueError for another word than `ties`, or a count below one.
    """
    if keep == "ties":
        return tied_with_best(losses, seed=seed)
    if not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep is {keep!r}; give a count of at least 1, or ties")
    return tuple(_order(losses)[:keep])


def _order(losses: Mapping[str, ArrayLike]) -> list[str]:
    means = {name: float(np.asarray(values, np.float64).mean()) for name, values in losses.items()}
    return sorted(means, key=lambda name: (means[name], name))


def _studentized(centred: Losses, seed: int, draws: int) -> Iterator[Losses]:
    """Mean over standard error of each draw, (draws, comparisons) in blocks, both of `centred`.

    A draw of one and the same sequence has no spread: plus or minus infinity, by its mean.
    """
    n = len(centred)
    generator = np.random.default_rng(seed)
    squares = centred**2
    for size in _blocks(draws, max(1, _BLOCK // n)):
        drawn = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
        means = counts @ centred / n
        variances = counts @ squares / n - means**2
        # Rounding leaves a trace where there is no spread.
        alone = counts.max(axis=1) == n
        errors = np.sqrt(np.maximum(variances, 0.0))
        errors[alone] = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            yield np.nan_to_num(means / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)


def _blocks(total: int, at_most: int) -> Sequence[int]:
    whole, rest = divmod(total, at_most)
    return [at_most] * whole + ([rest] if rest else [])
