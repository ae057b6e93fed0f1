"""`Scores`: one score per axis, layer and unit; to and from the rows of the `importance` table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """float64 arrays, the larger the more important.

    `hidden` (hidden,), `heads` (layers, heads), `mlp` (layers, mlp), `layers` (layers,).
    """

    hidden: NDArray
    heads: NDArray
    mlp: NDArray
    layers: NDArray

    def rows(self, width_metric: str, depth_metric: str) -> Iterator[dict[str, Any]]:
        """Rows of `importance`: layer is -1 for the hidden axis, and the layer itself for `layers`."""
        yield from _rows("hidden", -1, self.hidden, width_metric)
        for axis, scores in (("heads", self.heads), ("mlp", self.mlp)):
            for layer, values in enumerate(scores):
                yield from _rows(axis, layer, values, width_metric)
        for layer, value in enumerate(self.layers):
            yield {
                "axis": "layers",
                "layer": layer,
                "unit": layer,
                "metric": depth_metric,
                "score": float(value),
            }

    @classmethod
    def from_table(cls, table: pa.Table) -> Scores:
        """The inverse of `rows`. Rows may come in any order."""
        axes = np.asarray(table["axis"].to_pylist())
        layer, unit = table["layer"].to_numpy(), table["unit"].to_numpy()
        score = table["score"].to_numpy()

        def grid(axis: str, by_layer: bool) -> NDArray:
            chosen = axes == axis
            rows, columns = layer[chosen] if by_layer else np.zeros(chosen.sum(), int), unit[chosen]
            values = np.full((rows.max() + 1, columns.max() + 1), np.nan)
            values[rows, columns] = score[chosen]
            return values

        return cls(
            hidden=grid("hidden", by_layer=False)[0],
            heads=grid("heads", by_layer=True),
            mlp=grid("mlp", by_layer=True),
            layers=grid("layers", by_layer=False)[0],
        )


def _rows(axis: str, layer: int, values: NDArray, metric: str) -> Iterator[dict[str, Any]]:
    for unit, value in enumerate(values):
        yield {"axis": axis, "layer": layer, "unit": unit, "metric": metric, "score": float(value)}
