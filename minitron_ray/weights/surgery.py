"""`cut`: the teacher's weights with only the kept units, one tensor at a time.

Rows are taken before columns, so that of a memory-mapped tensor only the kept rows are read. A
tensor with no rows or columns to lose is copied as it is: cutting to the full shape gives the same
bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family
from minitron_ray.models.kept import Kept
from minitron_ray.weights.checkpoint import Checkpoint, torch_dtype

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


def cut(
    source: Checkpoint | Tensors,
    family: Family,
    teacher: Architecture,
    kept: Kept,
    *,
    dtype: torch.dtype | str | None = None,
) -> dict[str, torch.Tensor]:
    """The student's weights, as `cut_tensors` gives them, all in memory."""
    return dict(cut_tensors(source, family, teacher, kept, dtype=dtype))


def cut_tensors(
    source: Checkpoint | Tensors,
    family: Family,
    teacher: Architecture,
    kept: Kept,
    *,
    dtype: torch.dtype | str | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each of the student's weights, layer by layer: contiguous, in memory of its
    own, in `dtype` (the source's where None). Peak memory is that of the largest tensor.

    Layers are numbered anew. Raises ValueError where `kept` is no selection of `teacher`'s units, or
    a tensor of `source` has another shape than the table says.
    """
    student = kept.architecture(teacher)
    kind = None if dtype is None else torch_dtype(dtype)
    take = source.tensor if isinstance(source, Checkpoint) else source.__getitem__
    for name, layer, row in family.rows(student):
        origin = name if layer is None else row.name.format(layer=kept.layers[layer])
        tensor = take(origin)
        if tuple(tensor.shape) != family.shape(row, teacher):
            raise ValueError(
                f"{origin} has shape {tuple(tensor.shape)}, expected {family.shape(row, teacher)}"
            )
        indices = [_indices(axes, layer, teacher, kept) for axes in row.axes]
        yield name, _select(tensor, indices, kind)


def _indices(axes: tuple[str, ...], layer: int | None, teacher: Architecture, kept: Kept) -> NDArray | None:
    """Positions kept of one dimension, ascending; None for all of them."""
    positions = np.zeros(1, dtype=np.int64)
    whole = True
    for axis in axes:
        size = getattr(teacher, axis)
        chosen = _of_axis(axis, layer, kept)
        whole &= chosen is None or len(chosen) == size
        units = np.arange(size) if chosen is None else np.asarray(chosen)
        positions = (positions[:, None] * size + units).reshape(-1)
    return None if whole else positions


def _of_axis(axis: str, layer: int | None, kept: Kept) -> tuple[int, ...] | None:
    """Units kept on one axis in one of the student's layers; None for all, as on axes never cut."""
    if axis == "hidden":
        return kept.hidden
    if axis in ("heads", "mlp"):
        if layer is None:
            raise ValueError(f"{axis} is an axis of layers only")
        return kept.heads[layer] if axis == "heads" else kept.mlp[layer]
    return None


def _select(tensor: torch.Tensor, indices: list[NDArray | None], dtype: torch.dtype | None) -> torch.Tensor:
    import torch

    out = tensor
    for dimension, chosen in enumerate(indices):
        if chosen is None:
            continue
        index = torch.from_numpy(chosen)
        # Measured on bfloat16: plain indexing of columns is 1.7 times as fast as index_select.
        out = out.index_select(0, index) if dimension == 0 else out[:, index]
    out = out.detach().to(dtype if dtype is not None else out.dtype).contiguous()
    return out.clone() if out.data_ptr() == tensor.data_ptr() else out
