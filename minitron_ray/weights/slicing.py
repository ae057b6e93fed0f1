"""`cut_slices`: the same weights as `cut_tensors` gives, a few rows at a time.

A tensor larger than memory is cut from its file into another one: only the slices at hand are in
memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family, Row
from minitron_ray.models.kept import Kept
from minitron_ray.weights.checkpoint import Checkpoint, torch_dtype
from minitron_ray.weights.rows import StoredRows
from minitron_ray.weights.surgery import Selection, Term, origin_name, select, selections

if TYPE_CHECKING:
    import torch

SLICE_BYTES: Final = 2 * 2**20
"""Bytes of one slice of the student, at least one row: few enough to stay in the processor's cache."""
_CUTTING: Final = 4
"""Slices read and cut at a time: while some wait for the disk, others are computed."""
_WORTH_SKIPPING: Final = 32 * 2**10
"""Bytes between two rows from which it is quicker to read them by themselves."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of one of the student's tensors, contiguous, in memory of their own."""

    name: str
    first: int
    """The first row; a tensor's slices come in the order of its rows."""
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Job:
    row: Row
    origin: str
    shape: tuple[int, ...]
    """Of the student's tensor."""
    chosen: list[Selection]
    """What its rows and columns are taken from; of the rows only those of this slice."""
    first: int
    rows: range
    """Rows of the teacher's tensor that it lies within."""


def cut_slices(
    source: Checkpoint,
    family: Family,
    teacher: Architecture,
    kept: Kept,
    *,
    dtype: torch.dtype | str,
    only: Container[str] | None = None,
    slice_bytes: int = SLICE_BYTES,
) -> Iterator[Slice]:
    """The slices of each of the student's tensors, or of those in `only`, in `cut_tensors`' order and
    with its bits, in `dtype`. `source` must have been checked.

    Raises ConfigError, naming the tensor, where a kept value is not finite or does not fit `dtype`.
    """
    student = kept.architecture(teacher)
    kind = torch_dtype(dtype)
    jobs = _jobs(family, teacher, student, kept, only, slice_bytes // kind.itemsize)
    with StoredRows(source) as stored:

        def cut(job: _Job) -> Slice:
            return _cut(job, source, stored, teacher, student, kind)

        yield from _in_order(cut, jobs)


def _cut(
    job: _Job,
    source: Checkpoint,
    stored: StoredRows,
    teacher: Architecture,
    student: Architecture,
    kind: torch.dtype,
) -> Slice:
    rows = stored.read(job.origin, _runs(job, stored.row_bytes(job.origin)))
    out = select(rows, [_shifted(job.chosen[0], job.rows.start), *job.chosen[1:]])
    if job.row.tensor.rescaled is not None:
        out = job.row.tensor.rescaled(out, teacher, student)
    out = out.detach().to(kind).contiguous()
    if out.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr():
        out = out.clone()
    if not all_finite(out):
        raise ConfigError(_why_not_finite(source, job, kind))
    return Slice(job.row.name, job.first, out)


def _runs(job: _Job, row_bytes: int) -> list[range]:
    """The rows that are read: those that are taken, and the few that lie between."""
    if job.chosen[0] is None:
        return [job.rows]
    taken = np.unique(np.concatenate([term.positions for term in job.chosen[0]]))
    ends = np.flatnonzero((np.diff(taken) - 1) * row_bytes >= _WORTH_SKIPPING)
    starts = [0, *(ends + 1).tolist()]
    return [
        range(int(taken[first]), int(taken[last]) + 1)
        for first, last in zip(starts, [*ends.tolist(), len(taken) - 1], strict=True)
    ]


def _in_order(cut: Callable[[_Job], Slice], jobs: Iterable[_Job]) -> Iterator[Slice]:
    """`cut` of every job, in the order of the jobs; at an error no other is begun."""
    running: deque[Future[Slice]] = deque()
    with ThreadPoolExecutor(_CUTTING) as pool:
        try:
            for job in jobs:
                running.append(pool.submit(cut, job))
                if len(running) > 2 * _CUTTING:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _jobs(
    family: Family,
    teacher: Architecture,
    student: Architecture,
    kept: Kept,
    only: Container[str] | None,
    values: int,
) -> Iterator[_Job]:
    for row in family.rows(student):
        if only is not None and row.name not in only:
            continue
        shape = family.shape(row.tensor, student)
        origin, chosen = origin_name(row, kept), selections(row, teacher, kept)
        step = max(1, values // max(1, int(np.prod(shape[1:]))))
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            part = _part(chosen[0], first, last)
            rows = range(first, last) if part is None else _extent(part)
            yield _Job(row, origin, shape, [part, *chosen[1:]], first, rows)


def _part(rows: Selection, first: int, last: int) -> Selection:
    if rows is None:
        return None
    return [
        Term(term.positions[first:last], None if term.weights is None else term.weights[first:last])
        for term in rows
    ]


def _extent(terms: Iterable[Term]) -> range:
    terms = list(terms)
    first = min(int(term.positions.min()) for term in terms)
    last = max(int(term.positions.max()) for term in terms)
    return range(first, last + 1)


def _shifted(rows: Selection, start: int) -> Selection:
    return None if rows is None else [Term(term.positions - start, term.weights) for term in rows]


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: all bits of a float's exponent are set in those two."""
    import torch

    if values.numel() == 0:
        return True
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    bits = values.view(kind).numpy()
    infinity, sign = _infinity(values.dtype), 1 << (8 * values.dtype.itemsize - 1)
    # The bits of floats of one sign are ordered as their values: as signed integers those of positive floats are
    # the largest, as unsigned ones those of negative floats. `isfinite` is many times as slow, torch's `amax`
    # three times as numpy's `max`, and taking the sign off first twice.
    unsigned = bits.view(f"u{values.dtype.itemsize}")
    return bool(bits.max() < infinity and unsigned.max() < infinity + sign)


@cache
def _infinity(dtype: torch.dtype) -> int:
    """Its bits."""
    import torch

    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return int(torch.tensor(float("inf"), dtype=dtype).view(kind).item())


def _why_not_finite(source: Checkpoint, job: _Job, dtype: torch.dtype) -> str:
    import torch

    tensor = source.tensor(job.origin)
    part = tensor[job.rows.start : job.rows.stop]
    where = f"{source.folder}: {job.origin}"
    broken = torch.argwhere(~torch.isfinite(part))
    if len(broken):
        place = [int(broken[0][0]) + job.rows.start, *map(int, broken[0][1:])]
        value = float(tensor[tuple(place)])
        return (
            f"{where} holds {value} at {place}; fetch the model again, or ask its publisher for sound weights"
        )
    largest, name = float(part.abs().max()), str(dtype).removeprefix("torch.")
    return (
        f"{where} reaches {largest:.4g}, which does not fit {name} (at most {torch.finfo(dtype).max:.4g}); "
        f"choose --dtype bfloat16 or float32"
    )
