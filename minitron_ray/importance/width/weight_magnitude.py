"""Weight magnitude: the norm of a unit's own weights. A control, without any data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from minitron_ray.importance.metric import StaticUnitMetric

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from minitron_ray.importance.units import UnitScores
    from minitron_ray.models.architecture import Architecture
    from minitron_ray.models.family import Family, Product, Row
    from minitron_ray.weights.checkpoint import Checkpoint

PIECE: Final = 2**24
"""Weights that are squared at a time, in float32."""


class WeightMagnitude(StaticUnitMetric):
    """L2 norm over all weights that a cut of the unit would remove: its rows and columns of every tensor.

    Hidden channels reach through the whole model, embedding included, heads and KV groups through
    their rows and columns of the attention, experts through all of their weights and their router row.
    """

    kind: Literal["weight_magnitude"] = "weight_magnitude"

    @property
    def label(self) -> str:
        return "weight_magnitude"

    def score(self, checkpoint: Checkpoint, family: Family, architecture: Architecture) -> UnitScores:
        """Reads each tensor once, a piece at a time. Raises MinitronError naming one that is not finite."""
        import numpy as np

        from minitron_ray.importance.units import UnitScores, unit_shapes

        squares = {axis: np.zeros(shape) for axis, shape in unit_shapes(family, architecture).items()}
        for row in family.rows(architecture):
            sums = _sums_of_squares(checkpoint.tensor(row.name), row.name)
            if row.expert is not None:
                squares["experts"][row.layer, row.expert] += sums[0].sum()
            for dimension, blocks in zip(sums, row.tensor.blocks, strict=True):
                _spread(squares, dimension, blocks, row, architecture)
        if architecture.heads_per_group == 1:  # a head and its group go together
            squares["heads"] += squares["kv_heads"]
            squares["kv_heads"] = squares["heads"]
        return UnitScores(**{axis: np.sqrt(values) for axis, values in squares.items()})


def _sums_of_squares(tensor: torch.Tensor, name: str) -> list[NDArray]:
    """For each dimension of a tensor, the sum of squares at each of its places, float64."""
    import numpy as np
    import torch

    from minitron_ray.core.errors import MinitronError

    width = max(1, tensor[0].numel())
    pieces = tensor.split(max(1, PIECE // width))
    sums = [torch.zeros(size, dtype=torch.float64) for size in tensor.shape]
    start = 0
    for piece in pieces:
        squares = piece.float().square()
        for dimension in range(tensor.dim()):
            others = [other for other in range(tensor.dim()) if other != dimension]
            total = squares.sum(others, dtype=torch.float64) if others else squares.double()
            place = slice(start, start + len(piece)) if dimension == 0 else slice(None)
            sums[dimension][place] += total
        start += len(piece)
    found = [values.numpy() for values in sums]
    if not all(np.isfinite(values).all() for values in found):
        raise MinitronError(
            f"the weights of {name} hold NaN or infinity, so that units can't be ranked; fetch the "
            f"teacher again, or choose a checkpoint that is whole"
        )
    return found


def _spread(
    squares: dict[str, NDArray],
    sums: NDArray,
    blocks: tuple[Product, ...],
    row: Row,
    architecture: Architecture,
) -> None:
    """Adds one dimension's sums to the units of every axis in it."""
    import numpy as np

    start = 0
    for block in blocks:
        sizes = [int(factor) if factor.isdigit() else int(getattr(architecture, factor)) for factor in block]
        size = int(np.prod(sizes))
        values = sums[start : start + size].reshape(sizes)
        start += size
        for place, axis in enumerate(block):
            if axis not in squares:
                continue
            others = tuple(other for other in range(len(sizes)) if other != place)
            units = squares[axis] if axis == "hidden" else squares[axis][row.layer]
            if axis == "expert_mlp":
                units = units[row.expert]
            units += values.sum(axis=others)  # a view: the sums of this layer
